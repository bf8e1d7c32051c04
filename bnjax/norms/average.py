"""How much of a running average each step keeps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.norms.moments import Moments
from bnjax.types import Array

Schedule = Callable[[Any], Any]
# The fraction of the old average that is kept; the same as a function of the updates so far; or
# None for the mean of all batches.
Momentum = float | Schedule | None


def is_counted(momentum: Momentum, debias: bool) -> bool:
    """Returns whether the number of updates has to be known."""
    return debias or momentum is None or callable(momentum)


def kept_fraction(momentum: Momentum, debias: bool, count: Any, dtype: Any = jnp.float32) -> Any:
    """Returns the fraction of the old average that update number `count` (from 0) keeps.

    The new value gets the rest. With `debias` the made-up initial value is forgotten at once and
    the weights of the real ones, powers of the momentum m, are made to sum to 1 after every update:
    k(t) = m (1 - m^t) / (1 - m^(t+1)). This is Adam's correction (Kingma & Ba, 2015, section 3)
    applied to what is stored instead of to what is read. A schedule is taken as if its current
    value had always held.

    Args:
        momentum: as for `BatchNorm`.
        debias: whether the initial value is left out.
        count: int [], the updates so far; not used if `is_counted` is False.
        dtype: of the arithmetic where it is not a plain number that is returned.

    Raises:
        ValueError: for a momentum outside 0 to 1.

    >>> [round(float(kept_fraction(0.9, True, step)), 4) for step in range(3)]
    [0.0, 0.4737, 0.631]
    >>> [round(float(kept_fraction(None, False, step)), 4) for step in range(3)]
    [0.0, 0.5, 0.6667]
    """
    if isinstance(momentum, int | float) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum = {momentum} is not possible: it is the fraction of the old average that is "
            "kept, from 0 to 1. PyTorch's momentum is one minus this."
        )
    if momentum is None:
        return jnp.asarray(count, dtype) / (jnp.asarray(count, dtype) + 1)
    kept = momentum(count) if callable(momentum) else momentum
    if not debias:
        return kept
    count = jnp.asarray(count, dtype)
    # The ends of 0 to 1 would give 0 / 0.
    rate = jnp.log(jnp.clip(jnp.asarray(kept, dtype), 1e-6, 1 - 1e-6))
    return kept * jnp.expm1(count * rate) / jnp.expm1((count + 1) * rate)


def blend(old: Array, new: Array, kept: Any) -> Array:
    """Returns the updated average in the dtype of the old one, though at least float32."""
    return (kept * old + (1 - kept) * new).astype(jnp.promote_types(old.dtype, jnp.float32))


def rounded(average: Array, dtype: Any) -> Array:
    """Returns an average as it would be had it been stored in `dtype`, in the dtype that it has."""
    if dtype is None or jnp.promote_types(average.dtype, dtype) == dtype:
        return average
    # XLA may leave out a cast there and back.
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
    """Returns the running mean, variance and count of updates once a batch has been added.

    Args:
        mean, var: the old averages, one value for each channel.
        count: int, the updates so far; of several layers at once, one for each; None if uncounted.
        batch: its moments, of which as many values as `mean` has.
        momentum, debias, variance: as for `BatchNorm`.
        dtype: likewise, `average_dtype`.
        masked: whether a channel may have fewer than 2 values, and then keeps what it has.
    """
    kept = kept_fraction(momentum, debias, count, batch.mean.dtype)
    stored = batch.var
    if variance == "unbiased":
        stored = stored * (batch.count / jnp.maximum(batch.count - 1, 1))
    if jnp.ndim(kept):  # one for each layer, whose channels come after
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
