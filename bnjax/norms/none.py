"""No normalisation."""

import flax.linen as nn

from bnjax.arrays import Array


class Identity(nn.Module):
    """Returns its input, in the place of a norm."""

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns `x`; the other arguments are those of every norm and do nothing here."""
        return x
