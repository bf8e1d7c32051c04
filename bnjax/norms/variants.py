"""Ghost batch normalization and batch renormalization."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bnjax.norms.batch_norm import BatchNorm
from bnjax.norms.moments import Moments
from bnjax.norms.running_average import Averages
from bnjax.types import Array

Limit = float | Callable[[Any], Any]


class GhostBatchNorm(BatchNorm):
    """Batch normalization over virtual batches within a batch (Hoffer et al., 2017).

    Training with large batches then has as much noise as training with small batches. As in
    `BatchNorm`, the running averages use the whole batch on all devices, so evaluation does not
    depend on `virtual_batch`. In the paper, they are averages over the virtual batches. A virtual
    batch consists of consecutive unmasked examples on one device. The last virtual batch may be
    smaller, but if it would be a single vector, that vector joins the previous virtual batch.

    Attributes:
        virtual_batch: the number of examples in a virtual batch, at least 2.
    """

    virtual_batch: int = 50

    def _center_and_inverse(
        self, x: Array, axes: tuple[int, ...], mask: Any, batch: Moments, running: Averages
    ) -> tuple[Any, Any]:
        if self.virtual_batch < 2:
            raise ValueError(
                f"virtual_batch = {self.virtual_batch} is invalid: a variance needs at least 2 "
                "examples."
            )
        examples, *within = axes
        size = x.shape[examples]
        if mask is None:
            real = jnp.ones(size, bool)
        else:
            others = tuple(axis for axis in range(x.ndim) if axis != examples)
            real = jnp.broadcast_to(mask.any(others), (size,))
        owner = jnp.maximum(jnp.cumsum(real) - 1, 0) // self.virtual_batch
        if not within:  # a single remaining vector has no variance
            is_alone = (owner == real.sum() // self.virtual_batch) & (
                real.sum() % self.virtual_batch == 1
            )
            owner = jnp.maximum(owner - is_alone, 0)

        def total(values: Array) -> Array:
            """Returns the sum over the virtual batch of each example."""
            sums = jnp.moveaxis(jnp.sum(values, within, where=mask, keepdims=True), examples, 0)
            sums = jax.ops.segment_sum(sums, owner, num_segments=-(-size // self.virtual_batch))
            return jnp.moveaxis(sums[owner], 0, examples)

        count = jnp.maximum(total(jnp.ones_like(x)), 1)
        mean = total(x) / count
        return mean, lax.rsqrt(total(lax.square(x - mean)) / count + self.epsilon)


class BatchRenorm(BatchNorm):
    """Batch normalization corrected towards the running averages (Ioffe, 2017).

    Use it for small batches and batches of correlated examples. The normalised value is
    (x - mean_B) / std_B * r + d, where r = clip(std_B / std, 1 / r_max, r_max) and
    d = clip((mean_B - mean) / std, -d_max, d_max) have no gradient (the paper's algorithm 1).
    With r_max = 1 and d_max = 0, this is batch normalization; if neither limit is reached, training
    normalises exactly like evaluation. The norm stores the averages of
    `BatchNorm` and the number of updates. The paper averages the standard deviation instead of the
    variance.

    Attributes:
        r_max, d_max: the limits, as numbers or functions of the number of updates; None for those
            of `paper_limits`.
        renorm_steps: the number of updates after which `paper_limits` are constant.
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
        self, x: Array, axes: tuple[int, ...], mask: Any, batch: Moments, running: Averages
    ) -> tuple[Any, Any]:
        r_max, d_max = (
            limit(running.updates) if callable(limit) else limit for limit in self._limits()
        )
        inverse = lax.rsqrt(batch.var + self.epsilon)
        running_inverse = lax.rsqrt(running.var + self.epsilon)
        r = lax.stop_gradient(jnp.clip(running_inverse / inverse, 1 / r_max, r_max))
        d = lax.stop_gradient(
            jnp.clip((batch.mean - running.mean) * running_inverse, -d_max, d_max)
        )
        return batch.mean - d / (r * inverse), r * inverse


def paper_limits(steps: int) -> tuple[Limit, Limit]:
    """Returns r_max and d_max as functions of the number of updates (Ioffe, 2017, section 4).

    The paper's schedule of 40,000 steps is scaled to `steps`. In the first eighth of the steps,
    r_max is 1 and d_max is 0. Then r_max grows linearly to 3 at the last step, and d_max grows
    linearly to 5 at five eighths of the steps.

    >>> r_max, d_max = paper_limits(40_000)
    >>> [(float(r_max(step)), float(d_max(step))) for step in (5_000, 25_000, 40_000)]
    [(1.0, 0.0), (2.142857074737549, 5.0), (3.0, 5.0)]
    """
    shut = steps // 8
    r_max = optax.linear_schedule(1.0, 3.0, steps - shut, shut)
    d_max = optax.linear_schedule(0.0, 5.0, steps // 2, shut)
    return r_max, d_max
