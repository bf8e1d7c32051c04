"""Instance normalization (Ulyanov et al., 2016)."""

import flax.linen as nn

from bnjax.arrays import Array
from bnjax.norms.per_example import PerExampleNorm, check_positions, real_positions


class InstanceNorm(PerExampleNorm):
    """Normalises each channel of each example over its positions (equation 4)."""

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns the normalised input; `use_running_average` changes nothing. Other arguments as for `BatchNorm`.

        Raises:
            ValueError: if there is one position only (not at initialisation).
        """
        if not self.is_initializing():
            check_positions(f"InstanceNorm {'/'.join(self.path)}", x)
        norm = nn.InstanceNorm(
            epsilon=self.epsilon,
            use_scale=self.use_scale,
            use_bias=self.use_bias,
            use_fast_variance=False,  # the fast one is wrong where the mean is large
        )
        nn.share_scope(self, norm)
        return norm(x, mask=real_positions(mask, x))
