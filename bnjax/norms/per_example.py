"""What the norms share that look at one example at a time; they keep no averages and need no axis name."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from bnjax.arrays import Array
from bnjax.norms.moments import full_mask


class PerExampleNorm(nn.Module):
    """The constructor of the norms whose statistics are of one example [..., c], in training as in evaluation.

    Attributes:
        epsilon: added to the variance.
        use_scale, use_bias: whether a scale and a shift are learnt for each channel.
    """

    epsilon: float = 1e-6
    use_scale: bool = True
    use_bias: bool = True


def real_positions(mask: Array | None, x: Array) -> jax.Array | None:
    """Returns which values of `x` count, as bool of its shape, or None if masking cannot matter.

    An example's padding cannot reach the others. Where a mask has nothing of an example, all of it counts, so that its output is finite.
    """
    axes = tuple(range(1, x.ndim))
    if mask is None or (mask := full_mask(mask, x.shape, (0,))).size == mask.shape[0]:
        return None
    return jnp.broadcast_to(mask | ~mask.any(axes, keepdims=True), x.shape)


def per_channel(values: Array, rank: int) -> Array:
    """Returns values [c] as [1, ..., c] of this rank."""
    return values.reshape((1,) * (rank - 1) + (-1,))


def check_positions(label: str, x: Array) -> None:
    """Raises ValueError if each channel of an example has one value only, which leaves nothing to normalise by."""
    if x[0, ..., 0].size < 2:
        raise ValueError(
            f"{label} normalises each channel of each example by itself, and an input of shape {x.shape} has one value there: the "
            "output would not depend on how large it is. Use it on images only (leave it out of the dense layers), or use layer, "
            "group or rms normalization."
        )
