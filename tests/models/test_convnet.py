"""The ConvNet against a NumPy float64 network that is written from the tutorial's description."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.models.convnet import ACTIVATIONS, ConvNet

NORM = functools.partial(nn.BatchNorm, momentum=0.75, epsilon=1e-3)
SMALL = {
    "filters": (2, 3),
    "kernels": (3, 2),
    "strides": (2, 1),
    "dense": (7, 5),
    "dropout": (0.0, 0.0),
    "norm_dense": (True, True),
}


def shapes(model, side=32, channels=3):
    images = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


def random(model, side, channels):
    """Variables: no scale of one or shift of zero hides a mistake."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.uniform(0.2, 1.0, leaf.shape).astype(np.float32),
        shapes(model, side, channels),
    )


def reference(variables, x, *, placement, pooling, norm_dense, activation):
    """The evaluated network in float64, layer by layer."""
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, stats = variables["params"], variables["batch_stats"]

    def norm(x, name, where, wanted=True):
        if where != placement or not wanted:
            return x
        p, s = params[f"{name}_norm"], stats[f"{name}_norm"]
        return (x - s["mean"]) / np.sqrt(s["var"] + 1e-3) * p["scale"] + p["bias"]

    def conv(x, name, kernel, stride):
        weight = params[name]["kernel"]
        side = (x.shape[1] - kernel) // stride + 1
        out = np.zeros((len(x), side, side, weight.shape[-1]))
        for i in range(side):
            for j in range(side):
                patch = x[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
                out[:, i, j] = np.tensordot(patch, weight, 3)
        return out + params[name]["bias"]

    for i, (kernel, stride) in enumerate(zip(SMALL["kernels"], SMALL["strides"], strict=True)):
        x = norm(x, f"conv{i}", "pre")
        x = conv(x, f"conv{i}", kernel, stride if pooling == "none" else 1)
        x = norm(activation(norm(x, f"conv{i}", "before")), f"conv{i}", "after")
        if pooling != "none" and stride > 1:
            side = x.shape[1] // stride
            x = x[:, : side * stride, : side * stride]
            windows = x.reshape(len(x), side, stride, side, stride, -1)
            x = windows.max((2, 4)) if pooling == "max" else windows.mean((2, 4))
    x = x.reshape(len(x), -1)
    inputs = [True, *norm_dense]
    for name, has_norm, normed in zip(
        ("dense0", "dense1", "logits"), (*norm_dense, False), inputs, strict=True
    ):
        x = norm(x, name, "pre", normed) @ params[name]["kernel"] + params[name]["bias"]
        if name != "logits":
            x = activation(norm(x, name, "before", has_norm))
            x = norm(x, name, "after", has_norm)
    return x


@pytest.mark.parametrize("placement", ["pre", "before", "after"])
@pytest.mark.parametrize(
    ("pooling", "norm_dense", "activation", "by_hand"),
    [
        ("none", (True, True), "relu", lambda x: np.maximum(x, 0)),
        ("max", (False, False), "sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("avg", (True, False), "tanh", np.tanh),
    ],
)
def test_the_network_equals_float64_by_hand(placement, pooling, norm_dense, activation, by_hand):
    options = {"placement": placement, "pooling": pooling, "norm_dense": norm_dense}
    model = ConvNet(**SMALL | options, classes=4, norm=NORM, activation=ACTIVATIONS[activation])
    x = np.random.default_rng(1).uniform(size=(3, 11, 11, 2)).astype(np.float32) - 0.5
    variables = random(model, 11, 2)
    found = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    wanted = reference(variables, x.astype(np.float64), **options, activation=by_hand)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_the_tutorials_network_has_its_27_9_million_parameters():
    conv = 3 * 3 * (3 * 30 + 30 * 50 + 50 * 60) + 30 + 50 + 60
    dense = 7260 * 3500 + 3500 + 3500 * 700 + 700 + 700 * 10 + 10
    scale_shift = 2 * (3 + 30 + 50 + 7260 + 3500 + 700)
    count = {
        norm: sum(leaf.size for leaf in jax.tree.leaves(shapes(ConvNet(norm=norm))["params"]))
        for norm in (None, NORM)
    }
    assert count == {None: conv + dense, NORM: conv + dense + scale_shift}
    assert f"{count[NORM] / 1e6:.1f}" == "27.9"


def test_weights_are_glorot_uniform_and_biases_zero():
    init = jax.jit(functools.partial(ConvNet(dense=(350, 200)).init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    for name, fan_in, fan_out in (("conv1", 9 * 30, 9 * 50), ("dense1", 350, 200)):
        kernel, limit = np.asarray(params[name]["kernel"]), np.sqrt(6 / (fan_in + fan_out))
        assert np.abs(kernel).max() == pytest.approx(limit, rel=1e-2)
        assert np.abs(kernel).max() <= limit
        assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=2e-2)
        assert not np.any(params[name]["bias"])


def test_dropout_drops_the_right_share_in_training_only():
    model = ConvNet(
        filters=(), kernels=(), strides=(), dense=(20000, 8), dropout=(0.4, 0.0), classes=2
    )
    x, variables = jnp.ones((1, 2, 2, 1)), random(model, 2, 1)
    options = {"capture_intermediates": lambda module, _: isinstance(module, nn.Dropout)}
    shares = []
    for train in (True, False):
        key = {"dropout": jax.random.key(1)}
        _, seen = model.apply(variables, x, train=train, rngs=key, mutable=[], **options)
        (out,) = (leaf for leaf in jax.tree.leaves(seen) if leaf.shape[1] == 20000)
        shares.append(float((out == 0).mean()))
    assert shares == [pytest.approx(0.4, abs=0.02), 0.0]


def test_any_size_and_channels_and_low_precision():
    variables = shapes(ConvNet(**SMALL, norm=NORM), side=17, channels=1)
    assert variables["params"]["conv0"]["kernel"].shape == (3, 3, 1, 2)
    model = ConvNet(**SMALL, norm=NORM, dtype=jnp.bfloat16)
    variables = shapes(model, 11, 2)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    found = jax.eval_shape(
        functools.partial(model.apply, train=False), variables, jnp.ones((2, 11, 11, 2))
    )
    assert found.dtype == jnp.float32
