"""The network of "94 % on CIFAR-10 in 3.29 seconds on a single GPU" (K. Jordan, 2024)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnjax.models.convnet import ACTIVATIONS
from bnjax.models.layers import NormFactory, normalised, standardised_pixels
from bnjax.types import Array, Images, Logits, Mask

SIDE = 2  # the side of the whitened patches, in pixels
WHITENING_EPSILON = 5e-4

# torch's default initializer for convolutions and dense layers, uniform within ±1 / sqrt(fan in).
UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class SpeedNet(nn.Module):
    """A network of a whitening layer for 2x2 patches, groups of two convolutions and a head.

    A group consists of a 3x3 convolution, 2x2 max-pool, norm, activation, 3x3 convolution, norm and
    activation. After the groups come a 3x3 max-pool and a dense layer, whose logits are divided by
    the width of the last group. The convolutions of the groups have no bias and are initialised
    with `dirac`. With three groups, images need at least 25x25 pixels.

    The filters of the first convolution are computed by `whitening` from the images that are passed
    at initialisation, and are not trained; its bias is trained. Pass a few thousand training images
    to `init_state`.

    Attributes:
        norm: returns a norm layer, as for `bnjax.models.convnet.ConvNet`; None for no norm.
        widths: the number of channels of each group.
        activation: the activation of the groups, a function of an array; the whitening layer always
            uses GELU.
        classes: the number of logits.
        mean, std: the mean and standard deviation of the pixels of each channel, with which images
            are standardised; empty for no standardisation.
        dtype: the dtype of convolutions and logits; None for the dtype of the input. Parameters are
            float32.
    """

    norm: NormFactory | None = None
    widths: Sequence[int] = (64, 256, 256)
    activation: Callable[[Array], Array] = ACTIVATIONS["gelu"]
    classes: int = 10
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: Images, *, train: bool, mask: Mask | None = None) -> Logits:
        """Returns the logits [n, classes] of images [n, h, w, c]; `mask` is False for padding."""

        def activate(x: Array, name: str) -> Array:
            x = normalised(self.norm, x, train=train, mask=mask, name=f"{name}_norm")
            return self.activation(x)

        x = standardised_pixels(x, self.mean, self.std)
        x = ACTIVATIONS["gelu"](Whitening(dtype=self.dtype, name="whiten")(x))
        for i, width in enumerate(self.widths):
            convolve = functools.partial(
                nn.Conv, width, (3, 3), use_bias=False, kernel_init=dirac, dtype=self.dtype
            )
            x = max_pool(convolve(name=f"group{i}_conv0")(x), 2, train=train)
            x = activate(x, f"group{i}_conv0")
            x = activate(convolve(name=f"group{i}_conv1")(x), f"group{i}_conv1")
        x = max_pool(x, 3, train=train)
        x = x.reshape(x.shape[0], -1)
        head = nn.Dense(
            self.classes, use_bias=False, kernel_init=unit, dtype=self.dtype, name="logits"
        )
        x = head(x) / self.widths[-1]
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Whitening(nn.Module):
    """A 2x2 convolution with fixed filters from `whitening` and a trained bias."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the whitened patches [n, h - 1, w - 1, 8 c] of images [n, h, w, c]."""
        kernel = self.param("kernel", lambda key: whitening(x))
        bias = self.param("bias", nn.initializers.zeros, kernel.shape[-1:])
        x, kernel, bias = nn.dtypes.promote_dtype(
            x, jax.lax.stop_gradient(kernel), bias, dtype=self.dtype
        )
        patches = jax.lax.conv_general_dilated(
            jnp.asarray(x), kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return patches + bias.reshape(1, 1, 1, -1)


def whitening(images: Array) -> jax.Array:
    """Returns filters [2, 2, c, 8 c] that whiten 2x2 patches; the second half negates the first.

    The filters are the eigenvectors of the covariance of the patches, each divided by
    sqrt(eigenvalue + 5e-4).

    Args:
        images: standardised images, float [n, h, w, c].
    """
    images = jnp.asarray(images, jnp.float32)
    _, h, w, c = images.shape
    views = [
        images[:, i : h - SIDE + 1 + i, j : w - SIDE + 1 + j]
        for i in range(SIDE)
        for j in range(SIDE)
    ]
    patches = jnp.stack(views, -2).reshape(-1, SIDE * SIDE * c)
    patches = patches - patches.mean(0, keepdims=True)
    eigenvalues, eigenvectors = jnp.linalg.eigh(patches.T @ patches / patches.shape[0])
    filters = eigenvectors / jnp.sqrt(jnp.maximum(eigenvalues, 0) + WHITENING_EPSILON)[None]
    return jnp.concatenate([filters, -filters], -1).reshape(SIDE, SIDE, c, -1)


def dirac(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Returns a kernel [h, w, in, out] whose first filters each copy one input channel.

    The other filters follow torch's default distribution.
    """
    height, width, inputs, outputs = shape
    passed = min(inputs, outputs)
    kernel = UNIFORM(key, shape, dtype).at[..., :passed].set(0)
    return kernel.at[height // 2, width // 2, :passed, :passed].set(jnp.eye(passed, dtype=dtype))


def unit(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Returns a uniform random kernel [in, out] with standard deviation 1."""
    kernel = UNIFORM(key, shape, dtype)
    return kernel / kernel.std(ddof=1)


def max_pool(x: Array, side: int, *, train: bool) -> Array:
    """Returns the maximum of each square, [n, h // side, w // side, c]; drops incomplete squares.

    Training uses pairwise maxima, whose gradient is faster on a CPU than the gradient of
    `nn.max_pool`. (The gradient of `jnp.max` divides by the number of entries equal to the maximum,
    and this number is 0 if XLA computes the operand twice with different rounding.) Evaluation uses
    `nn.max_pool`, which gives the same values and allows norms to be folded across it.
    """
    if not train:
        return nn.max_pool(x, (side, side), (side, side))
    n, h, w, c = x.shape
    rows, columns = h // side, w // side
    x = x[:, : rows * side, : columns * side].reshape(n, rows, side, columns * side, c)
    x = functools.reduce(jnp.maximum, [x[:, :, i] for i in range(side)])
    x = x.reshape(n, rows, columns, side, c)
    return functools.reduce(jnp.maximum, [x[:, :, :, i] for i in range(side)])
