"""Batch normalization (Ioffe & Szegedy, 2015)."""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import lax

from bnjax.norms.moments import AxisName, Moments, full_mask, merge_over, moments, total_over
from bnjax.norms.running_average import Averages, Momentum, updated_average
from bnjax.types import Array


class BatchNorm(nn.Module):
    """Batch normalization, y = (x - mean) / sqrt(var + epsilon) * scale + bias for each channel.

    A drop-in replacement for `flax.linen.BatchNorm` with the same constructor, call and variables
    (`scale` and `bias` in "params", `mean` and `var` in "batch_stats"). Statistics are computed in
    float32 or higher precision, in training and in evaluation.

    Attributes:
        use_running_average: False to normalise by batch statistics and update the running averages;
            True to normalise by the running averages. Set it here or in the call.
        axis: the channel axes; all other axes are reduced.
        momentum: the fraction of the old average that an update keeps, or a function that maps the
            number of updates so far to this fraction. None for the plain mean over all batches.
        epsilon: a small constant added to the variance.
        dtype: the dtype of the result; None to promote the dtypes of the input and parameters.
        param_dtype: the dtype of scale and bias.
        use_bias, use_scale, bias_init, scale_init: whether to learn a shift and a scale, and the
            initializers of both.
        axis_name: the mapped axis (or axes) of `jax.pmap`, `jax.shard_map` or `jax.vmap` over which
            statistics are computed. None for plain `jax.jit`, where statistics are global for any
            sharding.
        axis_index_groups: groups of indices along the axis; each group has its own statistics.
        use_fast_variance, force_float32_reductions: accepted for compatibility with Flax, but
            ignored. The accurate variance is as fast, and reductions always use float32 or higher.
        variance: the divisor of the stored running variance, n ("biased", as in Flax and Keras) or
            n - 1 ("unbiased", as in PyTorch and TensorFlow's fused kernel). In training, inputs are
            always normalised by the biased variance.
        average_dtype: averages are rounded to the precision of this dtype after each update, to
            study averages in bfloat16, where rounding loses small updates. The dtype of the stored
            averages does not change. None for no rounding.
        debias: whether to give the initial mean 0 and variance 1 no weight in the averages, so that
            the averages are unbiased from the first update on.
        statistics: "batch" or "running" to always normalise by these statistics; None to follow
            `use_running_average`.
        update_average: whether to update the averages. True updates them whenever "batch_stats" is
            mutable, False never updates them, and None updates them if `use_running_average` is
            False.
        train_affine: whether scale and bias receive gradients.
        average_axis_name: an additional mapped axis (or axes) over which only the running averages
            are merged, weighted by counts. Each device or group of devices normalises by its own
            statistics, but the averages are the same everywhere.

    If `momentum` or `debias` requires the number of updates, this number is stored as `count`,
    int32 [], next to `mean` and `var`.

    >>> import jax, jax.numpy as jnp
    >>> norm, x = BatchNorm(momentum=0.5), jnp.array([[1.0], [3.0]])
    >>> variables = norm.init(jax.random.key(0), x, use_running_average=True)
    >>> y, updated = norm.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
    >>> print(y.round(3).ravel(), updated["batch_stats"]["mean"])
    [-1.  1.] [1.]
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    variance: str = "biased"
    debias: bool = False
    average_dtype: Any = None
    statistics: str | None = None
    update_average: bool | None = None
    train_affine: bool = True
    average_axis_name: AxisName | None = None

    @nn.compact
    def __call__(
        self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None
    ) -> Array:
        """Returns the normalised input, of the same shape.

        Args:
            x: the input, float. Batch statistics need at least 2 values per channel on all devices
                of the axis together.
            use_running_average: as in the constructor; set it in only one of the two places.
            mask: bool [n], or an array of the rank of x that broadcasts to x. False marks padding,
                which is excluded from the statistics and whose output is `bias`. The averages are
                not updated if a channel has fewer than 2 unmasked values.

        Raises:
            ValueError: if there are fewer than 2 values per channel, an option is invalid, or the
                mask has the wrong shape.
            NameError: if `axis_name` is not bound.
        """
        for name, allowed in (
            ("variance", ("biased", "unbiased")),
            ("statistics", (None, "batch", "running")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{self._label()} has {name} = {value!r}; allowed: {allowed}")
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        by_batch = (
            not use_running_average if self.statistics is None else self.statistics == "batch"
        )
        update = not use_running_average
        if self.update_average is not None:
            update = self.update_average and self.is_mutable_collection("batch_stats")

        given = jnp.asarray(x)
        axis_list = [self.axis] if isinstance(self.axis, int) else list(self.axis)
        if jnp.iscomplexobj(given) or any(
            not -given.ndim <= axis < given.ndim for axis in axis_list
        ):
            raise ValueError(
                f"{self._label()} cannot normalise an input of dtype {given.dtype} and shape "
                f"{given.shape} with axis = {self.axis}: it needs real numbers and existing axes."
            )
        wanted = jnp.promote_types(given.dtype, self.dtype or jnp.float32)
        x = given.astype(jnp.promote_types(wanted, jnp.float32))
        channels = [axis % x.ndim for axis in axis_list]
        axes = tuple(axis for axis in range(x.ndim) if axis not in channels)
        per_channel = tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))
        shape = tuple(size for axis, size in enumerate(x.shape) if axis not in axes)

        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, x.dtype)
        var = self.variable("batch_stats", "var", jnp.ones, shape, x.dtype)
        counted = self._is_counted() and (by_batch or update or self.is_initializing())
        if counted and not self.is_initializing() and not self.has_variable("batch_stats", "count"):
            raise ValueError(
                f"{self._label()} has momentum = {self.momentum} and debias = {self.debias}, which "
                "need the number of updates, but batch_stats has no `count` next to `mean` and "
                "`var`. Add `count`, int32 []; 0 restarts the averages."
            )
        count = self.variable("batch_stats", "count", jnp.zeros, (), jnp.int32) if counted else None
        stored = Averages(mean.value, var.value, None if count is None else count.value)
        running = Averages(
            stored.mean.astype(x.dtype).reshape(per_channel),
            stored.var.astype(x.dtype).reshape(per_channel),
            stored.updates,
        )

        if mask is not None:
            mask = full_mask(mask, x.shape, axes)
            if counted and any(mask.shape[axis] > 1 for axis in channels):
                raise ValueError(
                    f"{self._label()} has one count of updates for all channels, but the mask of "
                    f"shape {mask.shape} differs between channels. Use a mask with size 1 along "
                    "the channels, or a constant momentum without debias."
                )
            # NaN in padding would enter the gradient as 0 * NaN.
            x = jnp.where(mask, x, 0)
        if by_batch or update:
            batch = self._batch_moments(x, axes, mask)
        if by_batch:
            center, inverse = self._center_and_inverse(x, axes, mask, batch, running)
        else:
            center, inverse = running.mean, lax.rsqrt(running.var + self.epsilon)
        if update and not self.is_initializing():
            if self.average_axis_name is not None:
                batch = merge_over(batch, total_over(self.average_axis_name))
            new = updated_average(
                stored,
                batch,
                self.momentum,
                self.debias,
                self.variance,
                self.average_dtype,
                masked=mask is not None,
            )
            mean.value, var.value = jnp.asarray(new.mean), jnp.asarray(new.var)
            if count is not None:
                count.value = new.updates

        scale = self._affine("scale", self.scale_init, shape) if self.use_scale else None
        bias = self._affine("bias", self.bias_init, shape) if self.use_bias else None
        if scale is not None:
            inverse = inverse * scale.reshape(per_channel)
        deviation = x - center
        if mask is not None:
            # With fewer than 2 unmasked values, `inverse` is 1 / sqrt(epsilon), so padding would
            # grow to infinity over several layers.
            deviation = jnp.where(mask, deviation, 0)
        y = deviation * inverse
        if bias is not None:
            y = y + bias.reshape(per_channel)
        return y.astype(canonicalize_dtype(given, scale, bias, dtype=self.dtype))

    def _is_counted(self) -> bool:
        return self.debias or self.momentum is None or callable(self.momentum)

    def _center_and_inverse(
        self, x: Array, axes: tuple[int, ...], mask: Any, batch: Moments, running: Averages
    ) -> tuple[Any, Any]:
        """Returns the mean and 1 / sqrt(var + epsilon) with which training normalises.

        Subclasses may override this. The running averages do not depend on it.
        """
        return batch.mean, lax.rsqrt(batch.var + self.epsilon)

    def _batch_moments(self, x: Array, axes: tuple[int, ...], mask: Any) -> Moments:
        """Returns the moments of a batch, for normalising and for updating the running averages.

        A subclass that overrides this must also change `bnjax.clinic.network.Call.moments`.
        """
        if self.is_initializing():  # `init` may use a single example outside of the mapped axis
            return moments(x, axes, mask)
        devices = self._devices()
        if math.prod(x.shape[axis] for axis in axes) * devices < 2:
            raise ValueError(
                f"{self._label()} got an input of shape {x.shape}, which has fewer than 2 values "
                "per channel: the variance would be 0 and the output the same for every input. Use "
                "a larger batch, drop an incomplete last batch, compute the statistics over "
                "several devices with axis_name, evaluate with use_running_average=True, or use a "
                "norm without batch statistics, such as layer or group normalization."
            )
        return moments(x, axes, mask, total_over(self.axis_name, self.axis_index_groups))

    def _devices(self) -> int:
        """Returns the number of devices that share statistics; with groups, the smallest number."""
        if self.axis_name is None:
            return 1
        try:
            size = lax.axis_size(self.axis_name)
        except NameError as error:
            name = self.axis_name
            raise NameError(
                f"{self._label()} has axis_name = {name!r}, but there is no mapped axis {name!r} "
                f"here. Run it inside jax.pmap(..., axis_name={name!r}), "
                f"jax.vmap(..., axis_name={name!r}) or jax.shard_map over a mesh with that axis. "
                "With plain jax.jit use axis_name=None, because statistics are then global for any "
                "sharding of the batch."
            ) from error
        return min(map(len, self.axis_index_groups)) if self.axis_index_groups else size

    def _affine(
        self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...]
    ) -> Array:
        value = self.param(name, init, shape, self.param_dtype)
        return value if self.train_affine else lax.stop_gradient(value)

    def _label(self) -> str:
        return f"{type(self).__name__} {'/'.join(self.path)}".rstrip()
