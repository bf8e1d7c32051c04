"""Norms of one example at a time, without averages, and weight standardization beside them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.norms.moments import full_mask
from bnjax.types import Array


class PerExampleNorm(nn.Module):
    """Base of the norms with statistics of each example [n, ..., c] alone.

    They are called like `BatchNorm`; `use_running_average` has no effect.

    Attributes:
        epsilon: added to the variance.
        use_scale, use_bias: whether a scale and a shift are learnt for each channel.
        scale_init: what the scale starts as.
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
            ValueError: if the groups do not divide the channels, or, except at initialisation, if
                instance or filter response normalization gets one position only.
        """
        return self._normalised(x, _real_positions(mask, x))

    def _normalised(self, x: Array, where: Any) -> Array:
        """Returns the normalised input; `where` is True at the values that count."""
        raise NotImplementedError

    def _flax(self, norm: Callable[..., nn.Module], **fields: Any) -> nn.Module:
        """Returns a Flax norm with these attributes, which shares this module's parameters."""
        made = norm(
            epsilon=self.epsilon,
            use_scale=self.use_scale,
            use_bias=self.use_bias,
            scale_init=self.scale_init,
            use_fast_variance=False,  # the fast one is wrong where the mean is large
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
        groups: how many there are; has to divide the number of channels.
    """

    groups: int = 32

    def _normalised(self, x: Array, where: Any) -> Array:
        if self.groups < 1 or x.shape[-1] % self.groups:
            raise ValueError(
                f"GroupNorm {'/'.join(self.path)}: {self.groups} groups do not divide the "
                f"{x.shape[-1]} channels. Choose a number of groups that divides the channels of "
                "every layer."
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

    The mean is not subtracted and there is no shift; `use_bias` adds one, off by default.
    """

    use_bias: bool = False

    def _normalised(self, x: Array, where: Any) -> Array:
        norm = nn.RMSNorm(
            epsilon=self.epsilon,
            use_scale=self.use_scale,
            scale_init=self.scale_init,
            reduction_axes=tuple(range(1, x.ndim)),
        )
        nn.share_scope(self, norm)
        y = norm(x, mask=where)
        if self.use_bias:
            y = y + _per_channel(self.param("bias", nn.initializers.zeros, x.shape[-1:]), x.ndim)
        return y


class FilterResponseNorm(PerExampleNorm):
    """Divides each channel of each example by its root mean square nu (Singh & Krishnan, 2020).

    y = scale * x / sqrt(nu^2 + epsilon) + bias (equation 1). The mean is not subtracted; the
    activation that follows has to be a `ThresholdedLinear`, whose threshold makes up for it.
    """

    def _normalised(self, x: Array, where: Any) -> Array:
        _check_positions(self, x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        positions = tuple(range(1, x.ndim - 1))
        nu2 = lax.square(x).mean(positions, keepdims=True, where=where)
        y = x * lax.rsqrt(nu2 + self.epsilon)
        if self.use_scale:
            y = y * _per_channel(self.param("scale", self.scale_init, x.shape[-1:]), x.ndim)
        if self.use_bias:
            y = y + _per_channel(self.param("bias", nn.initializers.zeros, x.shape[-1:]), x.ndim)
        return y


class ThresholdedLinear(nn.Module):
    """The activation max(x, tau), tau learnt for each channel from 0 (Singh & Krishnan, 2020)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Returns the activation of x [..., c]."""
        threshold = self.param("threshold", nn.initializers.zeros, x.shape[-1:])
        return jnp.maximum(x, _per_channel(threshold, x.ndim))


class Identity(nn.Module):
    """Returns its input, in the place of a norm."""

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns `x`."""
        return x


def _real_positions(mask: Array | None, x: Array) -> jax.Array | None:
    """Returns which values of `x` count, bool of its shape, or None if masking cannot matter.

    An example's padding cannot reach the others. Where a mask has nothing of an example, all of it
    counts, so that its output is finite.
    """
    axes = tuple(range(1, x.ndim))
    if mask is None or (mask := full_mask(mask, x.shape, (0,))).size == mask.shape[0]:
        return None
    return jnp.broadcast_to(mask | ~mask.any(axes, keepdims=True), x.shape)


def _per_channel(values: Array, rank: int) -> Array:
    """Returns values [c] as [1, ..., c] of this rank."""
    return values.reshape((1,) * (rank - 1) + (-1,))


def _check_positions(norm: PerExampleNorm, x: Array) -> None:
    """Raises ValueError if each channel of an example has one value only: nothing to divide by.

    At initialisation that does no harm.
    """
    if x[0, ..., 0].size < 2 and not norm.is_initializing():
        raise ValueError(
            f"{type(norm).__name__} {'/'.join(norm.path)} normalises each channel of each example "
            f"by itself, and an input of shape {x.shape} has one value there: the output would not "
            "depend on how large it is. Use it on images only (leave it out of the dense layers), "
            "or use layer, group or rms normalization."
        )


class StandardizedConv(nn.Conv):
    """A convolution with weight standardization (Qiao et al., 2019, equation 7).

    Its kernel has mean 0 and variance 1 for each output channel. The kernel [h, w, in, out] before
    that is stored and trained, under the same names as in `flax.linen.Conv`.
    """

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Returns a parameter, standardised if it is the kernel."""
        value = super().param(name, *args, **kwargs)
        return standardize(value) if name == "kernel" else value


def standardize(kernel: Array) -> Array:
    """Returns the kernel with mean 0 and variance 1 over all axes but the last.

    >>> print(standardize(jnp.array([[1.0], [3.0]])).round(3).ravel())
    [-1.  1.]
    """
    axes = tuple(range(kernel.ndim - 1))
    centered = kernel - kernel.mean(axes, keepdims=True)
    return centered * lax.rsqrt(jnp.mean(lax.square(centered), axes, keepdims=True) + 1e-5)
