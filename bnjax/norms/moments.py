"""Computes accurate means and variances, with masks, across devices, for any mean."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.types import Array

AxisName = str | tuple[str, ...]
# A function that sums over devices; the identity on one device.
Total = Callable[[Any], Any]


class Moments(NamedTuple):
    """The mean, variance and count of each channel, as arrays that broadcast against the batch.

    Attributes:
        mean: the mean of the unmasked values; 0 if there are none.
        var: the biased variance (divided by n, not n - 1).
        count: the number n of unmasked values per channel on all devices together.
    """

    mean: Array
    var: Array
    count: Any


def moments(
    x: Array, axes: tuple[int, ...], mask: Array | None = None, total: Total = lambda part: part
) -> Moments:
    """Returns the moments of `x` over `axes` and over the devices that `total` sums over.

    The first pass computes the mean over all devices, and the second pass averages the squared
    deviations from this mean. Averaging the means of single devices would be wrong for unequal
    shards, and E[x^2] - E[x]^2 loses digits if the mean is large.

    Args:
        x: the values, float; their dtype is also the dtype of the arithmetic.
        axes: the axes to reduce.
        mask: bool, of the rank of x and broadcastable to x; False marks padding.
        total: a function that sums over devices.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True], [True], [False]])
    >>> result = moments(jnp.array([[1.0], [3.0], [99.0]]), (0,), mask)
    >>> print(*[float(value.squeeze()) for value in result])
    2.0 1.0 2.0
    """
    if mask is None:
        count: Any = total(_size(x, axes))
    else:
        repeats = _size(x, tuple(axis for axis in axes if mask.shape[axis] == 1))
        count = total(repeats * mask.sum(axes, keepdims=True, dtype=x.dtype))
    mean, var = _mean_and_var(x, mask, jnp.maximum(count, 1).astype(x.dtype), axes, total)
    return Moments(mean, var, count)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _mean_and_var(
    x: Any, mask: Any, count: Any, axes: tuple[int, ...], total: Total
) -> tuple[Array, Array]:
    mean = _average(x, mask, count, axes, total)
    return mean, _average(lax.square(x - mean), mask, count, axes, total)


@_mean_and_var.defjvp
def _(axes: tuple[int, ...], total: Total, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Computes the derivative without an unnecessary reduction that autodiff would add.

    The deviations sum to zero, so the derivative of the variance with respect to the mean is zero.
    That reduction would take a fifth of the layer's time on a CPU. A custom JVP supports forward
    mode, reverse mode and second derivatives.
    """
    (x, mask, count), (dx, *_) = primals, tangents
    mean, var = _mean_and_var(x, mask, count, axes, total)
    average = functools.partial(_average, mask=mask, count=count, axes=axes, total=total)
    return (mean, var), (average(dx), 2 * average((x - mean) * dx))


def _average(values: Array, mask: Any, count: Any, axes: tuple[int, ...], total: Total) -> Array:
    return total(jnp.sum(values, axes, where=mask, keepdims=True)) / count


def _size(x: Array, axes: tuple[int, ...]) -> int:
    return int(np.prod([x.shape[axis] for axis in axes], dtype=int))


def merge(mine: Moments, its: Moments) -> Moments:
    """Returns the moments of the union of two groups of values (Chan et al., 1979).

    The result is exact for any counts, including 0.

    >>> both = merge(Moments(1.0, 0.0, 1.0), Moments(4.0, 1.0, 2.0))  # the values 1, 3 and 5
    >>> print(*[round(float(value), 4) for value in both])
    3.0 2.6667 3.0
    """
    count = mine.count + its.count
    share = its.count / jnp.maximum(count, 1)
    apart = its.mean - mine.mean
    var = mine.var + (its.var - mine.var) * share + lax.square(apart) * share * (1 - share)
    return Moments(mine.mean + apart * share, var, count)


def merge_over(mine: Moments, total: Total) -> Moments:
    """Returns the joint moments of the values on all devices.

    Args:
        mine: the moments of this device, or of a group of devices that share their moments.
        total: a function that sums over devices that hold different values.
    """
    count = jnp.broadcast_to(jnp.asarray(mine.count, mine.mean.dtype), mine.mean.shape)
    all_values = total(count)
    share = count / jnp.maximum(all_values, 1)
    mean = total(mine.mean * share)
    return Moments(mean, total((mine.var + lax.square(mine.mean - mean)) * share), all_values)


def full_mask(mask: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Returns a bool mask with the same rank as the masked array.

    Args:
        mask: one value per example [n], or an array of full rank that broadcasts to `shape`; 0 or
            False marks padding.
        shape: the shape of the masked array.
        axes: the axes to reduce; the first of them is the example axis.

    Raises:
        ValueError: if the mask has any other shape.

    >>> full_mask(jnp.array([True, False]), (2, 8, 8, 3), (0, 1, 2)).shape
    (2, 1, 1, 1)
    """
    mask = jnp.asarray(mask, bool)
    if mask.ndim == 1 and len(shape) > 1 and mask.shape[0] == shape[axes[0]] and axes[0] == 0:
        mask = mask.reshape(-1, *[1] * (len(shape) - 1))
    if mask.ndim != len(shape) or any(
        size not in (1, whole) for size, whole in zip(mask.shape, shape, strict=True)
    ):
        raise ValueError(
            f"a mask of shape {mask.shape} does not fit values of shape {shape}. Give one value "
            f"per example, [{shape[axes[0]]}], or a mask of rank {len(shape)} that broadcasts, for "
            "instance mask[:, None, None, None] for images."
        )
    return mask


def total_over(axis_name: AxisName | None, groups: Sequence[Sequence[int]] | None = None) -> Total:
    """Returns a function that sums over the devices of an axis, or over each group of devices.

    Args:
        axis_name: the mapped axis or axes; None for no sum.
        groups: lists of indices along the axis; each index belongs to exactly one list. None for a
            single group.

    Raises:
        ValueError: if the groups omit or repeat an index.
    """
    if axis_name is None:
        return lambda part: part
    if groups is None:
        return lambda part: lax.psum(part, axis_name)
    size = lax.axis_size(axis_name)
    if sorted(index for group in groups for index in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups = {groups} does not divide the axis {axis_name!r} of {size} "
            f"devices: each index from 0 to {size - 1} must be in exactly one group."
        )
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    numbers = [group_of[index] for index in range(size)]

    def total(part: Any) -> Array:
        # The index is looked up here, because the derivative rule is traced at a different time.
        own = jnp.array(numbers)[lax.axis_index(axis_name)]
        # `axis_index_groups` of psum works neither in vmap nor with the vma check of shard_map, so
        # the sum has a slot for each group.
        slots = jnp.where(jnp.arange(len(groups)) == own, jnp.asarray(part)[..., None], 0)
        return lax.psum(slots, axis_name)[..., own]

    return total
