"""Norms that normalise each example separately, and weight standardization."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.norms.moments import full_mask
from bnjax.types import Array


class PerExampleNorm(nn.Module):
    """Base class for norms that normalise each example of x [n, ..., c] separately.

    They are called like `BatchNorm`; `use_running_average` has no effect.

    Attributes:
        epsilon: a small constant added to the variance.
        use_scale, use_bias: whether each channel has a learnt scale and shift.
        scale_init: the initializer of the scale.
    """

    epsilon: float = 1e-6
    use_scale: bool = True
    use_bias: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns the normalised input, with one scale and one shift per channel.

        Raises:
            ValueError: if the number of groups does not divide the number of channels, or if
                instance or filter response normalization receives an input with a single position
                (except at initialisation).
        """
        return self._normalised(x, _real_positions(mask, x))

    def _normalised(self, x: Array, where: Any) -> Array:
        """Returns the normalised input; `where` is True for unmasked values."""
        raise NotImplementedError

    def _flax(self, norm: Callable[..., nn.Module], **fields: Any) -> nn.Module:
        """Returns a Flax norm that shares the attributes and parameters of this module."""
        made = norm(
            epsilon=self.epsilon,
            use_scale=self.use_scale,
            use_bias=self.use_bias,
            scale_init=self.scale_init,
            use_fast_variance=False,  # the fast variance is inaccurate if the mean is large
            **fields,
        )
        nn.share_scope(self, made)
        return made


class LayerNorm(PerExampleNorm):
    """Normalises each example over positions and channels (Ba et al., 2016, equation 3)."""

    def _normalised(self, x: Array, where: Any) -> Array:
        norm = self._flax(nn.LayerNorm, reduction_axes=tuple(range(1, x.ndim)))
        return norm(x, mask=where)


class GroupNorm(PerExampleNorm):
    """Normalises each group of channels of each example (Wu & He, 2018, equation 7).

    Attributes:
        groups: the number of groups, a divisor of the number of channels.
    """

    groups: int = 32

    def _normalised(self, x: Array, where: Any) -> Array:
        if self.groups < 1 or x.shape[-1] % self.groups:
            raise ValueError(
                f"GroupNorm {'/'.join(self.path)}: {self.groups} groups do not divide the "
                f"{x.shape[-1]} channels. Choose a number of groups that divides the number of "
                "channels of every layer."
            )
        norm = self._flax(nn.GroupNorm, num_groups=self.groups)
        return norm(x, mask=where)


class InstanceNorm(PerExampleNorm):
    """Normalises each channel of each example over its positions (Ulyanov et al., 2016)."""

    def _normalised(self, x: Array, where: Any) -> Array:
        _check_positions(self, x)
        norm = self._flax(nn.InstanceNorm)
        return norm(x, mask=where)


class RMSNorm(PerExampleNorm):
    """Divides each example by its root mean square (Zhang & Sennrich, 2019, equation 4).

    The mean is not subtracted. There is no shift unless `use_bias` is True.
    """

    use_bias: bool = False

    def _normalised(self, x: Array, where: Any) -> Array:
        return self._divided(x, where, tuple(range(1, x.ndim)))

    def _divided(self, x: Array, where: Any, axes: tuple[int, ...]) -> Array:
        """Returns the input divided by its root mean square over the axes, scaled and shifted."""
        norm = nn.RMSNorm(
            self.epsilon, use_scale=self.use_scale, scale_init=self.scale_init, reduction_axes=axes
        )
        nn.share_scope(self, norm)
        y = norm(x, mask=where)
        if self.use_bias:
            y = y + _per_channel(self.param("bias", nn.initializers.zeros, x.shape[-1:]), x.ndim)
        return y


class FilterResponseNorm(RMSNorm):
    """Divides each channel of each example by its root mean square nu (Singh & Krishnan, 2020).

    y = scale * x / sqrt(nu^2 + epsilon) + bias (equation 1). The mean is not subtracted. To
    compensate, use the activation `ThresholdedLinear` after the norm.
    """

    use_bias: bool = True

    def _normalised(self, x: Array, where: Any) -> Array:
        _check_positions(self, x)
        return self._divided(x, where, tuple(range(1, x.ndim - 1)))


class ThresholdedLinear(nn.Module):
    """The activation max(x, tau) with a learnt tau per channel (Singh & Krishnan, 2020)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the activation to x [..., c]."""
        threshold = self.param("threshold", nn.initializers.zeros, x.shape[-1:])
        return jnp.maximum(x, _per_channel(threshold, x.ndim))


def _real_positions(mask: Array | None, x: Array) -> jax.Array | None:
    """Returns a mask with the shape of `x`, True for unmasked values, or None if it has no effect.

    Masking whole examples has no effect on other examples. A fully masked example counts as
    unmasked, so that its output is finite.
    """
    axes = tuple(range(1, x.ndim))
    if mask is None or (mask := full_mask(mask, x.shape, (0,))).size == mask.shape[0]:
        return None
    return jnp.broadcast_to(mask | ~mask.any(axes, keepdims=True), x.shape)


def _per_channel(values: Array, rank: int) -> Array:
    """Reshapes values [c] to [1, ..., 1, c] with the given rank."""
    return values.reshape((1,) * (rank - 1) + (-1,))


def _check_positions(norm: PerExampleNorm, x: Array) -> None:
    """Rejects inputs with a single value per channel and example, except at initialisation."""
    if x[0, ..., 0].size < 2 and not norm.is_initializing():
        raise ValueError(
            f"{type(norm).__name__} {'/'.join(norm.path)} normalises each channel of each example "
            f"separately, but an input of shape {x.shape} has one value per channel: the output "
            "would not depend on its magnitude. Use this norm only on images (not in dense "
            "layers), or use layer, group or rms normalization."
        )


class StandardizedConv(nn.Conv):
    """A convolution with weight standardization (Qiao et al., 2019, equation 7).

    The kernel of each output channel is standardised to mean 0 and variance 1. The stored and
    trained parameter is the original kernel [h, w, in, out], named as in `flax.linen.Conv`.
    """

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Returns a parameter; the kernel is standardised."""
        value = super().param(name, *args, **kwargs)
        return standardize(value) if name == "kernel" else value


def standardize(kernel: Array) -> Array:
    """Standardises a kernel to mean 0 and variance 1 over all axes except the last.

    >>> print(standardize(jnp.array([[1.0], [3.0]])).round(3).ravel())
    [-1.  1.]
    """
    axes = tuple(range(kernel.ndim - 1))
    centered = kernel - kernel.mean(axes, keepdims=True)
    return centered * lax.rsqrt(jnp.mean(lax.square(centered), axes, keepdims=True) + 1e-5)
