"""What is written as ONNX, against the program that JAX runs; and what is not, by its name."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import lax

from bnjax.errors import UserError
from bnjax.export.onnx import onnx_model
from bnjax.train_step import forward, init_variables

SHAPE = (6, 5, 2)
IMAGES = np.random.default_rng(0).integers(0, 256, (7, *SHAPE), np.uint8)


class Function(nn.Module):
    """A network without weights: what a function makes of images."""

    of: Callable

    def __call__(self, x, train):
        return self.of(x).reshape(x.shape[0], -1)


def model_of(model, images=IMAGES):
    """Returns the ONNX model of a network, and what the network returns."""
    init = jax.jit(functools.partial(init_variables, model))
    variables = init(jax.random.key(0), images[:1])
    made = onnx_model(model, *variables, images.shape[1:])
    own = jax.jit(functools.partial(forward, model=model, train=False))
    return made, own(*variables, {"image": images})[0]


def run(made, images=IMAGES):
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], {"images": images})[0]


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (doubled(x), None), lambda _, g: (2 * g,))
conv = functools.partial(lax.conv_general_dilated, window_strides=(1, 1), padding="VALID")
KERNEL = np.random.default_rng(1).normal(size=(3, 2, 2, 4)).astype(np.float32)
LAST = ("NHWC", "HWIO", "NHWC")
FUNCTIONS = {
    "powers": lambda x: x**2 + (x + 1) ** -2 + (x + 1) ** 0.3 + lax.integer_pow(x, 5),
    "exponentials": lambda x: jnp.exp(x) + jnp.log(x + 2) + jnp.expm1(x) - jnp.log1p(x),
    "gelus": lambda x: nn.gelu(x - 0.5) + nn.gelu(x - 0.5, approximate=False) + lax.erf(x),
    "activations": lambda x: nn.softplus(x) + nn.leaky_relu(x - 0.5) + nn.relu6(9 * x) + nn.selu(x),
    "softmax": lambda x: nn.softmax(x, axis=-1) + nn.log_softmax(x, axis=1),
    "comparisons": lambda x: jnp.where((x > 0.3) & ~(x >= 0.9) | (x < 0.1) | (x <= 0.0), x, -1),
    "equality": lambda x: jnp.where(x == x[:, :1], 1.0, 0.0) + jnp.where(x != 0, x, 2),
    "signs": lambda x: jnp.abs(x - 0.5) + jnp.sign(x - 0.5) - jnp.floor(3 * x) + jnp.ceil(2 * x),
    "extremes": lambda x: jnp.maximum(x, 0.2) + jnp.minimum(x, 0.4) + jnp.clip(x, 0.3, 0.6),
    "sums": lambda x: x.mean((1, 2)) + x.max((1, 2)) - x.min((1, 2)) + x.prod((1, 2)),
    "over the batch": lambda x: x - x.mean(0, keepdims=True) + x.std(0, keepdims=True),
    "ones for each image": lambda x: jnp.concatenate([x, jnp.ones_like(x[..., :1])], -1),
    "parts": lambda x: jnp.concatenate([x[:, ::2], x[:, -3:], x[:, 1:4, ...]], 1)[:, :, ::3],
    "a channel": lambda x: x[..., 1] + x[:, 2:3, :, 0],
    "places": lambda x: jnp.moveaxis(x[:, np.array([[0, 5], [2, 2]]), :, np.array([1, 0])], 2, 0),
    "a slice": lambda x: lax.slice_in_dim(x, 1, 5, 2, axis=1) + lax.slice_in_dim(x, 4, 6, axis=1),
    "mirror": lambda x: x[:, :, ::-1] - 2 * x[:, ::-1, :, ::-1],
    "split": lambda x: (lambda one, two: one - 2 * two)(*jnp.split(x, 2, axis=-1)),
    "orders": lambda x: x.transpose(0, 3, 1, 2).reshape(x.shape[0], 4, -1).swapaxes(1, 2),
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=3),
    "rows of all images": lambda x: x.reshape(-1, 10) @ np.ones((10, 2), np.float32),
    "attention": lambda x: jnp.einsum("nhwc,nhvc,nvk->nwhk", x, x, x[:, 0]),
    "squeezed": lambda x: jnp.squeeze(x[:, :1], 1) + jnp.expand_dims(x[:, 0, 0], 1),
    "strided": lambda x: conv(
        x, KERNEL, window_strides=(2, 1), padding=((1, 2), (0, 3)), dimension_numbers=LAST
    ),
    "dilated": lambda x: conv(x, KERNEL, rhs_dilation=(2, 3), dimension_numbers=LAST),
    "grouped": lambda x: conv(x, KERNEL[:, :, :1], feature_group_count=2, dimension_numbers=LAST),
    "channels first": lambda x: conv(x.transpose(0, 3, 1, 2), KERNEL.transpose(3, 2, 0, 1)),
    "one axis": lambda x: lax.conv_general_dilated(
        x[:, 0], KERNEL[:, 0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "max pooling": lambda x: nn.max_pool(x - 1, (3, 2), (2, 1), "SAME"),
    "avg pooling": lambda x: (
        nn.avg_pool(x, (3, 2), (2, 1), "SAME")
        + nn.avg_pool(x, (3, 2), (2, 1), "SAME", count_include_pad=False)
    ),
    "calls": lambda x: doubled(jax.checkpoint(jnp.sin)(x)) + jax.jit(jnp.cos)(x) + jax.nn.relu(x),
    "not needed": lambda x: (jnp.sort(x), x + 1)[1],
    "a number": lambda x: x.sum((1, 2, 3)) / x.shape[0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_operators_do_what_the_primitives_do(name):
    made, own = model_of(Function(FUNCTIONS[name]))
    for images in (
        (IMAGES, IMAGES[:1]) if "batch" not in name and "number" not in name else (IMAGES,)
    ):
        # The largest sums are of 60 values below 10, in float32.
        np.testing.assert_allclose(run(made, images), own[: len(images)], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (jnp.sort, "sort"),
        (lambda x: lax.cumsum(x, 1), "cumsum"),
        (lambda x: lax.fori_loop(0, 3, lambda i, y: y + 1, x), "scan|while"),
        (lambda x: x.astype(jnp.bfloat16) @ jnp.ones((2, 3), jnp.bfloat16), ".* to bfloat16"),
        (
            lambda x: lax.conv_transpose(x, KERNEL, (2, 2), "SAME"),
            "conv_general_dilated with a dilated input",
        ),
        (lambda x: x[:1] + x, "gather along the batch"),
        (lambda x: jnp.take_along_axis(x, (x > 0.5).astype(int), 1), "gather with computed"),
    ],
)
def test_what_is_not_known_is_named(function, named):
    with pytest.raises(UserError, match=f"the operation ({named}).*Export without --onnx"):
        model_of(Function(function))


class Conv(nn.Module):
    """Convolutions with the same kernel, in float images."""

    @nn.compact
    def __call__(self, x, train):
        conv = nn.Conv(2, (3, 3))
        return nn.relu(conv(nn.relu(conv(x)))).reshape(x.shape[0], -1)


def test_float_images_pass_unchanged_and_a_shared_kernel_is_stored_once():
    images = np.random.default_rng(0).normal(size=(3, *SHAPE)).astype(np.float32)
    variables = init_variables(Conv(), jax.random.key(0), images)
    made = onnx_model(Conv(), *variables, SHAPE, image_dtype=np.float32)
    own = forward(*variables, {"image": images}, model=Conv(), train=False)[0]
    np.testing.assert_allclose(run(made, images), own, rtol=1e-5, atol=1e-5)
    kernels = [array for array in made.graph.initializer if [*array.dims] == [2, 2, 3, 3]]
    assert len(kernels) == 1
