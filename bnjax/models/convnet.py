"""The network of the tutorial, with a configurable norm, activation and convolution."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from bnjax.models.layers import NormFactory, normalised
from bnjax.types import Array, Images, Logits, Mask

Placement = Literal["pre", "before", "after"]
Pooling = Literal["none", "max", "avg"]
# A function that takes `name` and returns a function of an array, for instance a module.
ActivationFactory = Callable[..., Any]

POOLS = {"max": nn.max_pool, "avg": nn.avg_pool}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "sigmoid": nn.sigmoid,
    "tanh": nn.tanh,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "silu": nn.silu,
}


class ConvNet(nn.Module):
    """A network of convolutions and dense layers, with norms in configurable places.

    The defaults give the tutorial's network (docs/results.md), with 27.9 million parameters for
    32x32x3 images. Images of any size work if the last convolution outputs at least one pixel.

    Attributes:
        filters, kernels, strides: the output channels, kernel size and stride of each convolution.
            Kernels are square, without padding.
        dense: the widths of the hidden dense layers.
        classes: the number of logits.
        norm: a factory for norm layers, for instance
            `functools.partial(flax.linen.BatchNorm, momentum=0.75)`; None for no norm.
        placement: "pre" normalises the input of each layer, including the first convolution and the
            layer of the logits; "before" and "after" normalise before or after the activation of
            each hidden layer.
        activation: the activation of the hidden layers, a function of an array.
        norm_activation: a factory for the activation directly after a norm, for norms that need a
            special activation; None to use `activation`.
        conv: a factory for convolutions, called like `flax.linen.Conv`.
        norm_dense: for each hidden dense layer, whether to normalise its output before dropout.
        dropout: the dropout rate after each hidden dense layer.
        pooling: "none" uses strided convolutions; "max" and "avg" use pooling with that stride
            instead.
        dtype: the dtype of the arithmetic; None for the dtype of the input. Parameters are float32.
        dense_product: the matrix product of dense layers, called like `jax.lax.dot_general`; None
            for `jax.lax.dot_general` itself.
    """

    filters: Sequence[int] = (30, 50, 60)
    kernels: Sequence[int] = (3, 3, 3)
    strides: Sequence[int] = (2, 1, 1)
    dense: Sequence[int] = (3500, 700)
    classes: int = 10
    norm: NormFactory | None = None
    activation: Callable[[Array], Array] = nn.relu
    norm_activation: ActivationFactory | None = None
    conv: Callable[..., nn.Module] = nn.Conv
    placement: Placement = "pre"
    norm_dense: Sequence[bool] = (True, True)
    dropout: Sequence[float] = (0.0, 0.0)
    pooling: Pooling = "none"
    dtype: Any = None
    dense_product: Callable[..., Any] | None = None

    @nn.compact
    def __call__(self, x: Images, *, train: bool, mask: Mask | None = None) -> Logits:
        """Returns the logits [n, classes] of images [n, h, w, c]; `mask` is False for padding."""

        def normalise(x: Array, where: Placement, name: str) -> Array:
            if where != self.placement:
                return x
            return normalised(self.norm, x, train=train, mask=mask, name=f"{name}_norm")

        def activate(x: Array, name: str, has_norm: bool = True) -> Array:
            if not has_norm:
                return self.activation(x)
            x = normalise(x, "before", name)
            if self.norm_activation is not None and self.placement == "before":
                x = self.norm_activation(name=f"{name}_activation")(x)
            else:
                x = self.activation(x)
            return normalise(x, "after", name)

        glorot = nn.initializers.glorot_uniform()
        dense = functools.partial(
            nn.Dense, kernel_init=glorot, dtype=self.dtype, dot_general=self.dense_product
        )
        for i, (filters, kernel, stride) in enumerate(
            zip(self.filters, self.kernels, self.strides, strict=True)
        ):
            x = normalise(x, "pre", f"conv{i}")
            window = (kernel, kernel)
            steps = (stride, stride) if self.pooling == "none" else (1, 1)
            conv = self.conv(
                filters,
                window,
                steps,
                padding="VALID",
                kernel_init=glorot,
                dtype=self.dtype,
                name=f"conv{i}",
            )
            x = activate(conv(x), f"conv{i}")
            if self.pooling != "none" and stride > 1:
                x = POOLS[self.pooling](x, (stride, stride), (stride, stride))

        x = x.reshape(x.shape[0], -1)
        has_norm, rate = True, 0.0  # for the input of the next dense layer
        for i, (width, norm_after, rate_after) in enumerate(
            zip(self.dense, self.norm_dense, self.dropout, strict=True)
        ):
            x = normalise(x, "pre", f"dense{i}") if has_norm else x
            x = nn.Dropout(rate, deterministic=not train)(x)
            x = dense(width, name=f"dense{i}")(x)
            x = activate(x, f"dense{i}", norm_after)
            has_norm, rate = norm_after, rate_after
        x = normalise(x, "pre", "logits") if has_norm else x
        x = nn.Dropout(rate, deterministic=not train)(x)
        x = dense(self.classes, name="logits")(x)
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))
