"""The batch norms of any linen model: which there are, and what each of them is given.

A norm is any `flax.linen.BatchNorm` or `bnjax.norms.BatchNorm`, wherever it stands: under
`nn.scan`, `nn.remat` and `nn.vmap` too. The model's code stays as it is; calls are intercepted.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.norms import BatchNorm
from bnjax.norms.moments import (
    AxisName,
    Moments,
    Total,
    full_mask,
    merge,
    moments,
    total_over,
)
from bnjax.train_step import forward
from bnjax.types import Array, Batch, BatchStats, Logits, Params

NORMS = (nn.BatchNorm, BatchNorm)
# How the network is run while it is watched: "train" as in training, units dropped and all;
# "batch" as in evaluation, but with every layer normalised by its batch; "running" as in
# evaluation.
Mode = Literal["train", "batch", "running"]
# The moments of what each norm has been given so far, by the path of its leaves in `batch_stats`.
Seen = Mapping[tuple[str, ...], Moments]
# The leaves beside `mean` and `var` in which a pass adds up what the norms see. They have the
# shape of `mean`, so that every lifted transformation carries them as it carries that.
_SEEN = ("seen_mean", "seen_var", "seen_count")
# What a norm is marked with that was made to use its running statistics whatever it was told.
FROZEN = "statistics_are_frozen"


@dataclasses.dataclass(frozen=True)
class NormLayer:
    """One batch norm, as one pass called it.

    Attributes:
        path: of its leaves in `batch_stats`.
        module: its fields: `epsilon`, `momentum`, …
        shape: of its input.
        dtype: likewise.
        axes: that it reduces.
        by_batch: whether that pass normalised by the batch.
    """

    path: tuple[str, ...]
    module: Any
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[int, ...]
    by_batch: bool

    @property
    def name(self) -> str:
        """The path with dots."""
        return ".".join(self.path)

    @property
    def variance(self) -> str:
        """What its average stores, "biased" or "unbiased"."""
        return getattr(self.module, "variance", "biased")


def norm_layers(
    model: nn.Module, params: Params, batch_stats: BatchStats, batch: Batch, *, train: bool
) -> tuple[NormLayer, ...]:
    """Returns the norms of a model in the order in which a pass calls them; computes nothing.

    One that is called several times, or stands for several under `nn.scan` or `nn.vmap`, is there
    once.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        params: its parameters, or their shapes.
        batch_stats: likewise.
        batch: `image` [n, h, w, c], or its shape, and optionally `mask`.
        train: as in training, or as in evaluation.
    """
    found: dict[tuple[str, ...], NormLayer] = {}

    def watch(norm: nn.Module, call: Callable[..., Array], x: Array, *args: Any, **kwargs: Any):
        is_there = norm.has_variable("batch_stats", "mean")  # one that was folded has no leaves
        y = call(x, *args, **kwargs)
        if is_there:
            layer = _layer(norm, x, *args, **kwargs)
            if getattr(norm, FROZEN, False):
                layer = dataclasses.replace(layer, by_batch=False)
            found.setdefault(layer.path, layer)
        return y

    def run(params: Params, batch_stats: BatchStats, batch: Batch) -> Any:
        keys = jax.random.key(0) if train else None
        # A model whose flag has no effect writes in evaluation, too.
        options: Any = {"train": train, "dropout": keys, "mutable": ("batch_stats",)}
        with nn.intercept_methods(only_norms(watch)):
            return forward(params, batch_stats, batch, model=model, **options)

    jax.eval_shape(run, params, batch_stats, dict(batch))
    return tuple(found.values())


def nothing_seen(batch_stats: BatchStats) -> Seen:
    """Returns where `observe` begins: no value has been seen."""
    leaves = flatten_dict(batch_stats)
    norms = [path for *path, name in leaves if name == "mean" and (*path, "var") in leaves]
    zeros = {(*path,): jnp.zeros(leaves[*path, "mean"].shape, jnp.float32) for path in norms}
    return {path: Moments(zero, zero, zero) for path, zero in zeros.items()}


def observe(
    params: Params,
    batch_stats: BatchStats,
    seen: Seen,
    batch: Batch,
    *,
    model: nn.Module,
    mode: Mode,
    dropout: jax.Array | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Logits, Seen]:
    """Returns the logits of a batch, and what the norms have seen with it added.

    The moments of what each norm was given are merged with those of earlier batches by their
    counts (Chan et al., 1979), in float32; no activation is kept. Where `mask` is False the example
    counts for nothing, whether or not the model knows of masks.

    Args:
        params: the weights.
        batch_stats: the running statistics; "batch" needs them for nothing but their shapes.
        seen: from `nothing_seen`, or from the batch before.
        batch: `image` [n, h, w, c] and optionally `mask` bool [n].
        model: any linen module with `__call__(x, train=...)`.
        mode: how the network is run.
        dropout: the key that says which units are dropped; for "train".
        axis_name: the mapped axis or axes over whose shards the moments are taken.

    Raises:
        ValueError: if a batch is padded and what a norm is given has no axis of the examples.
    """
    mask, train = batch.get("mask"), mode == "train"

    def watch(norm: Any, call: Callable[..., Array], x: Array, *args: Any, **kwargs: Any):
        if (before := seen_by(norm)) is None:
            return call(x, *args, **kwargs)
        given = moments_given(norm, x, kwargs.get("mask"), mask, total_over(axis_name))
        if mode == "batch":
            for name in ("mean", "var"):
                dtype = norm.get_variable("batch_stats", name).dtype
                norm.put_variable("batch_stats", name, getattr(given, name).astype(dtype))
        y = call(x, *args, **kwargs)
        put_seen(norm, merge(before, given))
        return y

    with nn.intercept_methods(only_norms(watch)):
        logits, written = forward(
            params,
            with_seen(batch_stats, seen),
            batch,
            model=model,
            train=train,
            dropout=dropout,
            mutable=("batch_stats",),
        )
    return logits, seen_in(written["batch_stats"], seen)


def with_seen(batch_stats: BatchStats, seen: Seen) -> BatchStats:
    """Returns the statistics with leaves beside them in which a pass adds up what norms see."""
    leaves = {
        (*path, name): leaf
        for path, moments_ in seen.items()
        for name, leaf in zip(_SEEN, moments_, strict=True)
    }
    return unflatten_dict(flatten_dict(batch_stats) | leaves)


def seen_in(batch_stats: BatchStats, paths: Iterable[tuple[str, ...]]) -> Seen:
    """Returns what the norms at these paths have seen, from such leaves."""
    leaves = flatten_dict(batch_stats)
    return {path: Moments(*(leaves[*path, name] for name in _SEEN)) for path in paths}


def seen_by(norm: nn.Module) -> Moments | None:
    """Returns what a bound norm has seen; None if it has no such leaves, as one that was folded."""
    if not norm.has_variable("batch_stats", _SEEN[0]):
        return None
    return Moments(*(norm.get_variable("batch_stats", name) for name in _SEEN))


def put_seen(norm: nn.Module, seen: Moments) -> None:
    """Stores what a bound norm has seen; after its call, which may be one of what it extends."""
    for name, leaf in zip(_SEEN, seen, strict=True):
        norm.put_variable("batch_stats", name, leaf)


def moments_given(
    norm: Any, x: Array, mask: Any, of_batch: Any = None, total: Total = lambda part: part
) -> Moments:
    """Returns the moments of the input of a bound norm, in float32 and of the shape of its `mean`.

    Args:
        norm: inside of a call of it.
        x: the input.
        mask: the one that it is given, or None.
        of_batch: the mask of the examples, which counts where it is given none.
        total: sums over devices.
    """
    axes = _reduced(norm, x)
    mask = _mask_of(norm, x.shape, axes, mask, of_batch)
    given = moments(jnp.asarray(x, jnp.float32), axes, mask, total)
    shape = norm.get_variable("batch_stats", "mean").shape
    return Moments(*(jnp.broadcast_to(leaf, given.mean.shape).reshape(shape) for leaf in given))


def only_norms(watch: Callable[..., Array]) -> Callable[..., Any]:
    """Returns an interceptor that gives each call of a norm to `watch`, and leaves all others."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        norm = context.module
        is_call = context.method_name == "__call__" and isinstance(norm, NORMS)
        # One that extends a norm and is called in another way calls what it extends.
        if is_call and "use_running_average" in inspect.signature(context.orig_method).parameters:
            return watch(norm, call, *args, **kwargs)
        return call(*args, **kwargs)

    return intercept


def _layer(norm: Any, x: Array, use_running_average: bool | None = None, **_: Any) -> NormLayer:
    by_running = nn.merge_param(
        "use_running_average", norm.use_running_average, use_running_average
    )
    chosen = getattr(norm, "statistics", None)
    return NormLayer(
        path=norm.path,
        module=norm.clone(parent=None, name=None),
        shape=x.shape,
        dtype=x.dtype,
        axes=_reduced(norm, x),
        by_batch=not by_running if chosen is None else chosen == "batch",
    )


def _reduced(norm: Any, x: Array) -> tuple[int, ...]:
    axes = [norm.axis] if isinstance(norm.axis, int) else norm.axis
    channels = {axis % x.ndim for axis in axes}
    return tuple(axis for axis in range(x.ndim) if axis not in channels)


def _mask_of(
    norm: nn.Module, shape: tuple[int, ...], axes: tuple[int, ...], mask: Any, of_batch: Any
) -> Array | None:
    """Returns the mask of a call, of full rank: the norm's own, or that of the batch's examples."""
    if mask is None and of_batch is None:
        return None
    if mask is None:
        if 0 not in axes or shape[0] != of_batch.shape[0]:
            raise ValueError(
                f"the batch is padded, and what the norm {'.'.join(norm.path)} is given, {shape}, "
                f"has not its {of_batch.shape[0]} examples along the first axis, so padding cannot "
                "be left out. Give batches without padding, or a model whose __call__ takes `mask`."
            )
        mask = of_batch
    return full_mask(mask, shape, axes)
