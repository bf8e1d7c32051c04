"""Layer normalization (Ba et al., 2016)."""

import flax.linen as nn

from bnjax.arrays import Array
from bnjax.norms.per_example import PerExampleNorm, real_positions


class LayerNorm(PerExampleNorm):
    """Normalises each example over everything that it has, positions and channels (equation 3), with a scale and shift for each channel."""

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns the normalised input; `use_running_average` changes nothing. Other arguments as for `BatchNorm`."""
        norm = nn.LayerNorm(
            epsilon=self.epsilon,
            use_scale=self.use_scale,
            use_bias=self.use_bias,
            reduction_axes=tuple(range(1, x.ndim)),
            use_fast_variance=False,  # the fast one is wrong where the mean is large
        )
        nn.share_scope(self, norm)
        return norm(x, mask=real_positions(mask, x))
