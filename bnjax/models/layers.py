"""Shared parts of networks: norms, standardised pixels, bfloat16 products, views of an image."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from bnjax.types import Array, Images, Logits, Mask

# A function that takes `name` and returns a module that is called like `flax.linen.BatchNorm`.
NormFactory = Callable[..., nn.Module]


def normalised(
    norm: NormFactory | None,
    x: Array,
    *,
    train: bool,
    mask: Array | None,
    name: str,
    **options: Any,
) -> Any:
    """Returns the output of a new norm layer, or x itself if `norm` is None.

    Args:
        norm: a factory for norm layers.
        x: [n, ..., c].
        train: whether to normalise by batch statistics and update the running averages.
        mask: bool [n] or [n, 1, ..., 1], or None; False marks padding.
        name: the name of the layer.
        options: more arguments of the factory.
    """
    if norm is None:
        return x
    # Flax's norms need a mask with as many axes as x.
    full_mask = None if mask is None else mask.reshape(-1, *[1] * (x.ndim - 1))
    return norm(name=name, **options)(x, use_running_average=not train, mask=full_mask)


def standardised_pixels(x: Images, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Returns (x - mean) / std per channel, in float32 or higher; x itself if both are empty.

    Args:
        x: float [n, h, w, c].
        mean, std: c numbers each, in the units of x.
    """
    if not mean and not std:
        return x
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    center, width = (jnp.asarray(one, x.dtype).reshape(1, 1, 1, -1) for one in (mean, std))
    return (x - center) / width


@jax.custom_vjp
def bfloat16_product(x: Array, weight: Array) -> Array:
    """Returns x @ weight, float32 [n, m], with bfloat16 operands and float32 sums.

    Both gradients are computed in the same way. On CPUs with bfloat16 instructions, this takes half
    the time of a float32 product.

    Args:
        x: float32 [n, k].
        weight: float32 [k, m].

    >>> weight = jnp.array([[1.0 + 2**-10], [4.0]])  # 1 + 2**-10 is 1 in bfloat16
    >>> bfloat16_product(jnp.array([[1.0, 2.0]]), weight)
    Array([[9.]], dtype=float32)
    """
    return _rounded_dot(x, weight, 1, 0)


def _rounded_dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """Returns the product of two matrices, summed over one axis of each."""
    x, y = x.astype(jnp.bfloat16), y.astype(jnp.bfloat16)
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, axes, preferred_element_type=jnp.float32)


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return bfloat16_product(x, weight), (x, weight)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = saved
    # XLA's fast kernels for CPUs sum over the last axis of the first operand. The layout makes XLA
    # transpose x in memory; otherwise it uses a kernel that takes twice as long.
    columns = with_layout_constraint(x.T.astype(jnp.bfloat16), Layout((0, 1)))
    return _rounded_dot(dy, weight, 1, 1), _rounded_dot(columns, dy, 1, 0)


bfloat16_product.defvjp(_forward, _backward)


def bfloat16_dot_general(
    x: Array, weight: Array, dimension_numbers: Any, precision: Any = None
) -> Array:
    """Computes `bfloat16_product`, for the argument `dot_general` of `flax.linen.Dense`.

    Args:
        x: float32 [..., k].
        weight: float32 [k, m].
        dimension_numbers: as for `jax.lax.dot_general`, for a sum over the last axis of `x`.
        precision: not used.

    Raises:
        ValueError: for other shapes or dimension numbers.

    >>> import flax.linen as nn
    >>> layer = nn.Dense(3, dot_general=bfloat16_dot_general)
    >>> layer.init_with_output(jax.random.key(0), jnp.ones((2, 5, 4)))[0].shape
    (2, 5, 3)
    """
    if weight.ndim != 2 or dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
        raise ValueError(
            f"bfloat16_dot_general needs inputs [..., k] and weights [k, m], but got {x.shape} and "
            f"{weight.shape}"
        )
    rows = bfloat16_product(x.reshape(-1, x.shape[-1]), weight)
    return rows.reshape(*x.shape[:-1], weight.shape[1])


VIEWS = (1, 2, 6)


class Views(nn.Module):
    """In evaluation, averages the logits of a network over several views of each image.

    This wrapper does not change training, parameters or statistics.

    Attributes:
        network: any linen module with `__call__(x, train=...)`.
        views: the number of views. 1 is the image itself; 2 adds the mirror image; 6 also adds two
            shifted copies of both, one pixel up and left, and one pixel down and right. The four
            shifted views together have the same weight as the other two (K. Jordan, 2024). Edges
            are padded by reflection.
        share: the fraction of each batch for which several views are averaged: the images with the
            lowest maximum scores. If `share` is below 1, the logits of an image depend on the rest
            of the batch.
    """

    network: nn.Module
    views: int = 6
    share: float = 1.0

    @nn.compact
    def __call__(self, x: Images, *, train: bool, mask: Mask | None = None) -> Logits:
        """Returns the logits [n, classes] of images [n, h, w, c]; `mask` is False for padding."""
        # The scope of this module is reused, so that variables keep their names.
        network = self.network.copy(parent=self.scope, name=None)
        takes_mask = "mask" in inspect.signature(type(self.network).__call__).parameters

        def logits(x: Array, mask: Array | None) -> Any:
            return network(x, train=train, **{"mask": mask} if takes_mask else {})

        if train or self.views == 1:
            return logits(x, mask)
        if self.share == 1:
            return averaged(functools.partial(logits, mask=mask), x, self.views)
        once = logits(x, mask)
        certain = jax.nn.softmax(once).max(-1)
        if mask is not None:
            certain = jnp.where(mask, certain, jnp.inf)
        again = jnp.argsort(certain)[: max(1, round(self.share * len(x)))]
        of_these = functools.partial(logits, mask=None if mask is None else mask[again])
        return once.at[again].set(averaged(of_these, jnp.asarray(x)[again], self.views))


def with_views(network: nn.Module, views: int, share: float = 1.0) -> nn.Module:
    """Returns the network wrapped in `Views`, or the network itself for one view."""
    return network if views == 1 else Views(network, views, share)


def averaged(logits: Any, x: Images, views: int) -> Array:
    """Returns the mean logits [n, classes] over views of images [n, h, w, c].

    Args:
        logits: a function that maps images to logits.
        x: the images.
        views: 2 or 6, as for `Views`.

    Raises:
        ValueError: if `views` is invalid.
    """
    if views not in VIEWS:
        raise ValueError(f"views = {views} is invalid; allowed: {', '.join(map(str, VIEWS))}")
    straight = (logits(x) + logits(x[:, :, ::-1])) / 2
    if views == 2:
        return straight
    height, width = x.shape[1:3]
    wide = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = (averaged(logits, wide[:, i : i + height, i : i + width], 2) for i in (0, 2))
    return (straight + sum(shifted) / 2) / 2
