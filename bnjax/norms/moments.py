"""Mean and variance of a batch, and the running averages of both.

Exact with masks, over several devices and for means far from zero.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.types import Array

AxisName = str | tuple[str, ...]
# The sum over the devices; the identity on one device.
Total = Callable[[Any], Any]
# The fraction of the old average that an update keeps; or a function of the number of updates so
# far; or None for the mean of all batches.
Momentum = float | Callable[[Any], Any] | None


class Moments(NamedTuple):
    """Mean, variance and count of the values of each channel; shapes broadcast against the batch.

    Attributes:
        mean: the mean of the real values; 0 without real values.
        var: the biased variance (divided by n, not n - 1).
        count: n, the number of real values per channel over all devices.
    """

    mean: Array
    var: Array
    count: Any


def moments(
    x: Array, axes: tuple[int, ...], mask: Array | None = None, total: Total = lambda part: part
) -> Moments:
    """Returns the moments of `x` over `axes` and over the devices of `total`.

    Two passes: the mean over all devices, then the squared deviations from it. A mean of the
    devices' means would be wrong for unequal shards, and E[x^2] - E[x]^2 loses digits if the mean
    is large.

    Args:
        x: float; the arithmetic is in its dtype.
        axes: the axes to reduce.
        mask: bool, of x's rank and broadcastable to it; False is padding.
        total: sums over devices.

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
    """Computes the derivative without a reduction that autodiff would add.

    Deviations sum to zero, so a change of the mean does not change the variance. The reduction is
    a fifth of the layer's time on a CPU. A JVP supports forward mode, reverse mode and second
    derivatives.
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
    """Returns the moments of the union of two sets of values (Chan et al., 1979).

    Exact for any counts, including empty sets.

    >>> both = merge(Moments(1.0, 0.0, 1.0), Moments(4.0, 1.0, 2.0))  # of 1, 3 and 5
    >>> print(*[round(float(value), 4) for value in both])
    3.0 2.6667 3.0
    """
    count = mine.count + its.count
    share = its.count / jnp.maximum(count, 1)
    apart = its.mean - mine.mean
    var = mine.var + (its.var - mine.var) * share + lax.square(apart) * share * (1 - share)
    return Moments(mine.mean + apart * share, var, count)


def merge_over(mine: Moments, total: Total) -> Moments:
    """Returns the moments of the values of all devices together.

    Args:
        mine: the moments of this device, or of its group of devices with shared moments.
        total: sums over the devices with different values.
    """
    count = jnp.broadcast_to(jnp.asarray(mine.count, mine.mean.dtype), mine.mean.shape)
    all_values = total(count)
    share = count / jnp.maximum(all_values, 1)
    mean = total(mine.mean * share)
    return Moments(mean, total((mine.var + lax.square(mine.mean - mean)) * share), all_values)


def full_mask(mask: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """Returns the mask as bool of full rank.

    Args:
        mask: one value per example [n], or of full rank and broadcastable to `shape`; True or 1 is
            a real value.
        shape: the shape of the masked array.
        axes: the axes to reduce; the first is the axis of the examples.

    Raises:
        ValueError: if the mask has a different shape.

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
        groups: lists of indices along the axis, each index in exactly one of them; None for one
            group.

    Raises:
        ValueError: if the groups leave out or repeat an index.
    """
    if axis_name is None:
        return lambda part: part
    if groups is None:
        return lambda part: lax.psum(part, axis_name)
    size = lax.axis_size(axis_name)
    if sorted(index for group in groups for index in group) != list(range(size)):
        raise ValueError(
            f"axis_index_groups = {groups} does not divide the axis {axis_name!r} of {size} "
            f"devices: each index from 0 to {size - 1} has to be in exactly one group."
        )
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    numbers = [group_of[index] for index in range(size)]

    def total(part: Any) -> Array:
        # Looked up here because the rule of the derivative is traced at a different time.
        own = jnp.array(numbers)[lax.axis_index(axis_name)]
        # One slot per group also works under vmap and under shard_map's vma check, which do not
        # support psum's axis_index_groups.
        slots = jnp.where(jnp.arange(len(groups)) == own, jnp.asarray(part)[..., None], 0)
        return lax.psum(slots, axis_name)[..., own]

    return total


def kept_fraction(momentum: Momentum, debias: bool, count: Any, dtype: Any = jnp.float32) -> Any:
    """Returns the fraction of the old average that update number `count` (from 0) keeps.

    The new value has weight 1 - k. With `debias` the initial value has weight 0, and the weights
    of the batches, powers of the momentum m, sum to 1 after every update:
    k(t) = m (1 - m^t) / (1 - m^(t+1)). This is Adam's correction (Kingma & Ba, 2015, section 3),
    applied when storing instead of when reading. With a momentum schedule, the current value is
    used for all earlier updates.

    Args:
        momentum: as for `BatchNorm`.
        debias: whether the initial value has weight 0.
        count: int [], the number of updates so far; ignored for a fixed momentum without `debias`.
        dtype: the dtype of the result, unless it is a Python number.

    Raises:
        ValueError: for a momentum outside 0 to 1.

    >>> [round(float(kept_fraction(0.9, True, step)), 4) for step in range(3)]
    [0.0, 0.4737, 0.631]
    >>> [round(float(kept_fraction(None, False, step)), 4) for step in range(3)]
    [0.0, 0.5, 0.6667]
    """
    if isinstance(momentum, int | float) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum = {momentum} is invalid: it is the fraction of the old average that is "
            "kept, from 0 to 1; PyTorch's momentum is one minus this."
        )
    if momentum is None:
        return jnp.asarray(count, dtype) / (jnp.asarray(count, dtype) + 1)
    kept = momentum(count) if callable(momentum) else momentum
    if not debias:
        return kept
    count = jnp.asarray(count, dtype)
    # 0 and 1 would give 0 / 0.
    rate = jnp.log(jnp.clip(jnp.asarray(kept, dtype), 1e-6, 1 - 1e-6))
    return kept * jnp.expm1(count * rate) / jnp.expm1((count + 1) * rate)


def blend(old: Array, new: Array, kept: Any) -> Array:
    """Returns the updated average in the dtype of the old average, at least float32."""
    return (kept * old + (1 - kept) * new).astype(jnp.promote_types(old.dtype, jnp.float32))


def rounded(average: Array, dtype: Any) -> Array:
    """Returns an average rounded to the precision of `dtype`, without a change of its dtype."""
    if dtype is None or jnp.promote_types(average.dtype, dtype) == dtype:
        return average
    # XLA may remove a pair of casts.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(average, info.nexp, info.nmant)


def updated_average(
    mean: Array,
    var: Array,
    count: Any,
    batch: Moments,
    momentum: Momentum,
    debias: bool,
    variance: str,
    dtype: Any = None,
    *,
    masked: bool,
) -> tuple[Array, Array, Any]:
    """Returns the running mean, the running variance and the number of updates after a batch.

    Args:
        mean, var: the old averages, one value per channel.
        count: int, the number of updates so far; one per stacked layer; None if not counted.
        batch: the moments of the batch, of the same size.
        momentum, debias, variance: as for `BatchNorm`.
        dtype: `average_dtype` of `BatchNorm`.
        masked: whether a channel may have fewer than 2 real values; its averages then stay
            unchanged.
    """
    kept = kept_fraction(momentum, debias, count, batch.mean.dtype)
    stored = batch.var
    if variance == "unbiased":
        stored = stored * (batch.count / jnp.maximum(batch.count - 1, 1))
    if jnp.ndim(kept):  # one per stacked layer, before the channel axis
        kept = kept.reshape(*kept.shape, *[1] * (mean.ndim - kept.ndim))
    enough = jnp.broadcast_to(batch.count >= 2, batch.mean.shape).reshape(mean.shape)
    averages = []
    for old, new in ((mean, batch.mean), (var, stored)):
        updated = rounded(blend(old, new.reshape(old.shape), kept), dtype)
        averages.append(jnp.where(enough, updated, old) if masked else updated)
    if count is not None:
        channels = tuple(range(jnp.ndim(count), mean.ndim))
        count = count + (enough.any(channels) if masked else 1)
    return *averages, count
