"""Filter response normalization and its activation (Singh & Krishnan, 2020)."""

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from bnjax.arrays import Array
from bnjax.norms.per_example import PerExampleNorm, check_positions, per_channel, real_positions


class FilterResponseNorm(PerExampleNorm):
    """Divides each channel of each example by the root of its mean square nu^2 (equation 1), y = scale * x / sqrt(nu^2 + epsilon) + bias.

    The mean is not subtracted; the activation that follows has to be a `ThresholdedLinear`, whose threshold makes up for it.
    """

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns the normalised input; `use_running_average` changes nothing. Other arguments as for `BatchNorm`.

        Raises:
            ValueError: if there is one position only (not at initialisation).
        """
        if not self.is_initializing():
            check_positions(f"FilterResponseNorm {'/'.join(self.path)}", x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        nu2 = lax.square(x).mean(
            tuple(range(1, x.ndim - 1)), keepdims=True, where=real_positions(mask, x)
        )
        y = x * lax.rsqrt(nu2 + self.epsilon)
        if self.use_scale:
            y = y * per_channel(self.param("scale", nn.initializers.ones, x.shape[-1:]), x.ndim)
        if self.use_bias:
            y = y + per_channel(self.param("bias", nn.initializers.zeros, x.shape[-1:]), x.ndim)
        return y


class ThresholdedLinear(nn.Module):
    """The thresholded linear unit max(x, tau), with tau learnt for each channel from 0 (equation 3): ReLU to begin with."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the activation of x [..., c]."""
        return jnp.maximum(
            x, per_channel(self.param("threshold", nn.initializers.zeros, x.shape[-1:]), x.ndim)
        )
