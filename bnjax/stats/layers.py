"""The batch norms of any linen model: which there are, and what each of them is given.

A norm is any `flax.linen.BatchNorm` or `bnjax.norms.BatchNorm`, wherever it stands: under
`nn.scan`, `nn.remat` and `nn.vmap` too. The model's code stays as it is; calls are intercepted.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.arrays import Array, Batch, BatchStats, Logits, Params
from bnjax.norms import BatchNorm
from bnjax.norms.moments import AxisName, Moments, full_mask, merge, moments, total_over
from bnjax.train_step import forward

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
        with nn.intercept_methods(_only_norms(watch)):
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

    def watch(norm: nn.Module, call: Callable[..., Array], x: Array, *args: Any, **kwargs: Any):
        if not norm.has_variable("batch_stats", _SEEN[0]):
            return call(x, *args, **kwargs)
        layer = _layer(norm, x, *args, **kwargs)
        given = moments(
            jnp.asarray(x, jnp.float32), layer.axes, _mask_of(layer, kwargs, mask),
            total_over(axis_name),
        )  # fmt: skip
        own: list[Any] = [
            norm.get_variable("batch_stats", name) for name in ("mean", "var", *_SEEN)
        ]
        shape = own[0].shape
        given = Moments(
            *(jnp.broadcast_to(leaf, given.mean.shape).reshape(shape) for leaf in given)
        )
        if mode == "batch":
            norm.put_variable("batch_stats", "mean", given.mean.astype(own[0].dtype))
            norm.put_variable("batch_stats", "var", given.var.astype(own[1].dtype))
        y = call(x, *args, **kwargs)
        for name, leaf in zip(_SEEN, merge(Moments(*own[2:]), given), strict=True):
            norm.put_variable("batch_stats", name, leaf)
        return y

    leaves = {
        (*path, name): leaf
        for path, moments_ in seen.items()
        for name, leaf in zip(_SEEN, moments_, strict=True)
    }
    with nn.intercept_methods(_only_norms(watch)):
        logits, written = forward(
            params,
            unflatten_dict(flatten_dict(batch_stats) | leaves),
            batch,
            model=model,
            train=train,
            dropout=dropout,
            mutable=("batch_stats",),
        )
    leaves = flatten_dict(written["batch_stats"])
    return logits, {path: Moments(*(leaves[*path, name] for name in _SEEN)) for path in seen}


def _only_norms(watch: Callable[..., Array]) -> Callable[..., Any]:
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
    axes = [norm.axis] if isinstance(norm.axis, int) else norm.axis
    channels = {axis % x.ndim for axis in axes}
    by_running = nn.merge_param(
        "use_running_average", norm.use_running_average, use_running_average
    )
    chosen = getattr(norm, "statistics", None)
    return NormLayer(
        path=norm.path,
        module=norm.clone(parent=None, name=None),
        shape=x.shape,
        dtype=x.dtype,
        axes=tuple(axis for axis in range(x.ndim) if axis not in channels),
        by_batch=not by_running if chosen is None else chosen == "batch",
    )


def _mask_of(layer: NormLayer, given: Mapping[str, Any], of_batch: Any) -> Array | None:
    """Returns the mask of a call, of full rank: the norm's own, or that of the batch's examples."""
    mask = given.get("mask")
    if mask is None and of_batch is None:
        return None
    if mask is None:
        if 0 not in layer.axes or layer.shape[0] != of_batch.shape[0]:
            raise ValueError(
                f"the batch is padded, and what the norm {layer.name} is given, {layer.shape}, has "
                f"not its {of_batch.shape[0]} examples along the first axis, so padding cannot be "
                "left out. Give batches without padding, or a model whose __call__ takes `mask`."
            )
        mask = of_batch
    return full_mask(mask, layer.shape, layer.axes)
