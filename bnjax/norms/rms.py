"""Root mean square normalization (Zhang & Sennrich, 2019)."""

import flax.linen as nn

from bnjax.arrays import Array
from bnjax.norms.per_example import PerExampleNorm, per_channel, real_positions


class RMSNorm(PerExampleNorm):
    """Divides each example by the root mean square of everything that it has, and scales each channel (equation 4).

    The mean is not subtracted and there is no shift; `use_bias` adds one, off by default.
    """

    use_bias: bool = False

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns the normalised input; `use_running_average` changes nothing. Other arguments as for `BatchNorm`."""
        norm = nn.RMSNorm(
            epsilon=self.epsilon, use_scale=self.use_scale, reduction_axes=tuple(range(1, x.ndim))
        )
        nn.share_scope(self, norm)
        y = norm(x, mask=real_positions(mask, x))
        return (
            y + per_channel(self.param("bias", nn.initializers.zeros, x.shape[-1:]), x.ndim)
            if self.use_bias
            else y
        )
