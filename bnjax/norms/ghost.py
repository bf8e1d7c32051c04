"""Ghost batch normalization (Hoffer et al., 2017): small batches within the large one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.norms.batch_norm import BatchNorm
from bnjax.norms.moments import Moments
from bnjax.types import Array


class GhostBatchNorm(BatchNorm):
    """Batch normalization of each `virtual_batch` examples by themselves.

    It keeps the noise of a small batch in a large one. The running averages are those of
    `BatchNorm`: mean and variance of the whole batch, over all devices, so that evaluation does not
    depend on how the batch was divided (the paper averages those of the virtual batches). Virtual
    batches are filled with real examples in order and do not reach across the devices of
    `axis_name`; the last one may be smaller.

    Attributes:
        virtual_batch: k, the examples of a virtual batch, at least 2.
    """

    virtual_batch: int = 50

    def _center_and_inverse(
        self, x: Array, axes: tuple[int, ...], mask: Any, batch: Moments, running: Moments
    ) -> tuple[Any, Any]:
        if self.virtual_batch < 2:
            raise ValueError(
                f"virtual_batch = {self.virtual_batch} is not possible: a variance needs 2 "
                "examples or more."
            )
        examples, *within = axes
        size = x.shape[examples]
        if mask is None:
            real = jnp.ones(size, bool)
        else:
            others = tuple(axis for axis in range(x.ndim) if axis != examples)
            real = jnp.broadcast_to(mask.any(others), (size,))
        owner = jnp.maximum(jnp.cumsum(real) - 1, 0) // self.virtual_batch

        def total(values: Array) -> Array:
            """Sums over each virtual batch; every example gets the sum of its own."""
            sums = jnp.moveaxis(jnp.sum(values, within, where=mask, keepdims=True), examples, 0)
            sums = jax.ops.segment_sum(sums, owner, num_segments=-(-size // self.virtual_batch))
            return jnp.moveaxis(sums[owner], 0, examples)

        count = jnp.maximum(total(jnp.ones_like(x)), 1)
        mean = total(x) / count
        return mean, lax.rsqrt(total(lax.square(x - mean)) / count + self.epsilon)
