"""Updates the running averages of the mean and variance, with momentum, debiasing and rounding."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnjax.norms.moments import Moments
from bnjax.types import Array

# The fraction of the old average that an update keeps, a function that maps the number of updates
# so far to this fraction, or None for the plain mean over all batches.
Momentum = float | Callable[[Any], Any] | None


class Averages(NamedTuple):
    """The running averages of a norm.

    Attributes:
        mean, var: one value per channel.
        updates: the number of updates so far, int []; None if updates are not counted. For layers
            stacked by `nn.scan` or `nn.vmap`, one number per layer.
    """

    mean: Array
    var: Array
    updates: Any


def kept_fraction(momentum: Momentum, debias: bool, count: Any, dtype: Any = jnp.float32) -> Any:
    """Returns the fraction k of the old average that update number `count` (from 0) keeps.

    The new value has weight 1 - k. With `debias` the initial value has weight 0, and the weights of
    all batches sum to 1 after every update: for a momentum m, k(t) = m (1 - m^t) / (1 - m^(t+1)).
    This is the bias correction of Adam (Kingma & Ba, 2015, section 3), applied when the average is
    stored instead of when it is read. With a momentum schedule, the correction uses the current
    momentum for all earlier updates.

    Args:
        momentum: as for `BatchNorm`.
        debias: whether the initial value has weight 0.
        count: the number of updates so far, int []; ignored for a constant momentum without
            `debias`.
        dtype: the dtype of the result, unless the result is a Python number.

    Raises:
        ValueError: if the momentum is not between 0 and 1.

    >>> [round(float(kept_fraction(0.9, True, step)), 4) for step in range(3)]
    [0.0, 0.4737, 0.631]
    >>> [round(float(kept_fraction(None, False, step)), 4) for step in range(3)]
    [0.0, 0.5, 0.6667]
    """
    if isinstance(momentum, int | float) and not 0 <= momentum <= 1:
        raise ValueError(
            f"momentum = {momentum} is invalid: it is the fraction of the old average that is "
            "kept, from 0 to 1. PyTorch's momentum is one minus this fraction."
        )
    if momentum is None:
        return jnp.asarray(count, dtype) / (jnp.asarray(count, dtype) + 1)
    kept = momentum(count) if callable(momentum) else momentum
    if not debias:
        return kept
    count = jnp.asarray(count, dtype)
    # A momentum of exactly 0 or 1 would give 0 / 0.
    rate = jnp.log(jnp.clip(jnp.asarray(kept, dtype), 1e-6, 1 - 1e-6))
    return kept * jnp.expm1(count * rate) / jnp.expm1((count + 1) * rate)


def updates_for(momentum: float, share: float) -> int:
    """Returns the number of updates after which the initial values have at most this weight.

    >>> updates_for(0.99, 0.01)
    459
    """
    return math.ceil(math.log(share) / math.log(momentum))


def momentum_for(updates: int, share: float) -> float:
    """Returns the largest momentum after which the initial values have at most this weight.

    The momentum is a multiple of 0.01.

    >>> momentum_for(20, 0.01)  # 0.79 ** 20 is 0.009
    0.79
    """
    return math.floor(100 * share ** (1 / updates)) / 100


def blend(old: Array, new: Array, kept: Any) -> Array:
    """Returns the updated average in the dtype of the old average, at least float32."""
    return (kept * old + (1 - kept) * new).astype(jnp.promote_types(old.dtype, jnp.float32))


def rounded(average: Array, dtype: Any) -> Array:
    """Returns an average rounded to the precision of `dtype`, in its original dtype."""
    if dtype is None or jnp.promote_types(average.dtype, dtype) == dtype:
        return average
    # A cast to `dtype` and back is not reliable, because XLA may remove it.
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(average, info.nexp, info.nmant)


def updated_average(
    old: Averages,
    batch: Moments,
    momentum: Momentum,
    debias: bool,
    variance: str,
    dtype: Any = None,
    *,
    masked: bool,
) -> Averages:
    """Returns the running averages after a batch.

    Args:
        old: the averages before the batch.
        batch: the moments of the batch, with as many values as the averages.
        momentum, debias, variance: as for `BatchNorm`.
        dtype: the `average_dtype` of `BatchNorm`.
        masked: whether channels may have fewer than 2 unmasked values; the averages of such
            channels are not updated.
    """
    kept = kept_fraction(momentum, debias, old.updates, batch.mean.dtype)
    stored = batch.var
    if variance == "unbiased":
        stored = stored * (batch.count / jnp.maximum(batch.count - 1, 1))
    if jnp.ndim(kept):  # one value per stacked layer; the channel axis is last
        kept = kept.reshape(*kept.shape, *[1] * (old.mean.ndim - kept.ndim))
    enough = jnp.broadcast_to(batch.count >= 2, batch.mean.shape).reshape(old.mean.shape)

    def average(before: Array, now: Array) -> Array:
        after = rounded(blend(before, now.reshape(before.shape), kept), dtype)
        return jnp.where(enough, after, before) if masked else after

    updates = old.updates
    if updates is not None:
        channels = tuple(range(jnp.ndim(updates), old.mean.ndim))
        updates = updates + (enough.any(channels) if masked else 1)
    return Averages(average(old.mean, batch.mean), average(old.var, stored), updates)
