"""Group normalization (Wu & He, 2018)."""

import flax.linen as nn

from bnjax.arrays import Array
from bnjax.norms.per_example import PerExampleNorm, real_positions


class GroupNorm(PerExampleNorm):
    """Normalises each group of channels of each example over channels and positions (equation 7).

    Attributes:
        groups: how many there are; has to divide the number of channels.
    """

    groups: int = 32

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns the normalised input; `use_running_average` changes nothing. Other arguments as for `BatchNorm`.

        Raises:
            ValueError: if the groups do not divide the channels.
        """
        if self.groups < 1 or x.shape[-1] % self.groups:
            raise ValueError(
                f"GroupNorm {'/'.join(self.path)}: {self.groups} groups do not divide the {x.shape[-1]} channels. "
                "Choose a number of groups that divides the channels of every layer."
            )
        norm = nn.GroupNorm(
            num_groups=self.groups,
            epsilon=self.epsilon,
            use_scale=self.use_scale,
            use_bias=self.use_bias,
            use_fast_variance=False,  # the fast one is wrong where the mean is large
        )
        nn.share_scope(self, norm)
        return norm(x, mask=real_positions(mask, x))
