"""Batch renormalization (Ioffe, 2017): training that uses the running averages too."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jax import lax

from bnjax.norms.batch_norm import BatchNorm
from bnjax.norms.moments import Moments
from bnjax.types import Array

Limit = float | Callable[[Any], Any]


class BatchRenorm(BatchNorm):
    """Batch normalization corrected towards the running averages, for small or unlike batches.

    With x^ = (x - mean_B) / std_B * r + d, where r = clip(std_B / std, 1 / r_max, r_max) and
    d = clip((mean_B - mean) / std, -d_max, d_max) are constants to the gradient (the paper's
    algorithm 1). With r_max = 1 and d_max = 0 it is batch normalization; where neither limit binds,
    training normalises exactly as evaluation does. The averages are those of `BatchNorm`, of the
    variance (the paper's is of the standard deviation), with the count of updates beside them.

    Attributes:
        r_max, d_max: the limits, as numbers or as functions of the number of updates; None for
            those of `paper_limits`.
        renorm_steps: when the limits of `paper_limits` are fully open.
    """

    r_max: Limit | None = None
    d_max: Limit | None = None
    renorm_steps: int = 40_000

    def _limits(self) -> tuple[Limit, Limit]:
        r_max, d_max = paper_limits(self.renorm_steps)
        return (
            r_max if self.r_max is None else self.r_max,
            d_max if self.d_max is None else self.d_max,
        )

    def _is_counted(self) -> bool:
        return super()._is_counted() or any(map(callable, self._limits()))

    def _center_and_inverse(
        self, x: Array, axes: tuple[int, ...], mask: Any, batch: Moments, running: Moments
    ) -> tuple[Any, Any]:
        r_max, d_max = (
            limit(running.count) if callable(limit) else limit for limit in self._limits()
        )
        inverse = lax.rsqrt(batch.var + self.epsilon)
        running_inverse = lax.rsqrt(running.var + self.epsilon)
        r = lax.stop_gradient(jnp.clip(running_inverse / inverse, 1 / r_max, r_max))
        d = lax.stop_gradient(
            jnp.clip((batch.mean - running.mean) * running_inverse, -d_max, d_max)
        )
        return batch.mean - d / (r * inverse), r * inverse


def paper_limits(steps: int) -> tuple[Limit, Limit]:
    """Returns r_max and d_max as the paper opens them (section 4), its 40,000 steps made `steps`.

    Both are shut, to 1 and 0, for an eighth of the steps; r_max then grows to 3 until the end and
    d_max to 5 until five eighths.

    >>> r_max, d_max = paper_limits(40_000)
    >>> [(float(r_max(step)), float(d_max(step))) for step in (5_000, 25_000, 40_000)]
    [(1.0, 0.0), (2.142857074737549, 5.0), (3.0, 5.0)]
    """
    shut = steps // 8
    r_max = optax.linear_schedule(1.0, 3.0, steps - shut, shut)
    d_max = optax.linear_schedule(0.0, 5.0, steps // 2, shut)
    return r_max, d_max
