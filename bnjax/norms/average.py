"""How much of a running average each step keeps."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from bnjax.arrays import Array

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
