"""Finds the batch norms of any linen model and the moments of their inputs.

A norm is any `flax.linen.BatchNorm` or `bnjax.norms.BatchNorm`, also under `nn.scan`, `nn.remat`
and `nn.vmap`. The model needs no change: calls are intercepted.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
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
from bnjax.types import Array, Batch, BatchStats, Images, Logits, Params

NORMS = (nn.BatchNorm, BatchNorm)
# "train": as in training, with dropout; "batch": as in evaluation, but with batch statistics;
# "running": as in evaluation.
Mode = Literal["train", "batch", "running"]
# The moments of the inputs of each norm so far, by the path of its leaves in `batch_stats`.
Seen = Mapping[tuple[str, ...], Moments]
# The leaves beside `mean` and `var` that collect these moments during a pass. They have the shape
# of `mean`, so lifted transformations handle them like `mean`.
_SEEN = ("seen_mean", "seen_var", "seen_count")
# Marks a norm with statistics frozen by `bnjax.clinic.freezing`.
FROZEN = "statistics_are_frozen"
# The known training flags of `__call__`, and their values in training.
FLAGS = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}
Call = Callable[[Any, Images, bool], Any]


@struct.dataclass
class Network:
    """A trained linen model; a pytree of its variables.

    Attributes:
        params: the weights.
        batch_stats: the running statistics; for `audit` also a list of one tree per replica.
        model: a linen module with `__call__(x, train=...)`.
    """

    params: Params
    batch_stats: Any
    model: nn.Module = struct.field(pytree_node=False)

    def norms(self, batch: Batch, *, train: bool = False) -> tuple["NormLayer", ...]:
        """Returns the norms of the model in the order of their calls, without any computation.

        A norm with several calls, or stacked by `nn.scan` or `nn.vmap`, is one entry.

        Args:
            batch: `image` [n, h, w, c], or its shape, and optionally `mask`.
            train: whether to trace training instead of evaluation.
        """
        found: dict[tuple[str, ...], NormLayer] = {}

        def watch(norm: Any, call: Callable[..., Array], x: Array, *args: Any, **kwargs: Any):
            is_stored = norm.has_variable("batch_stats", "mean")  # a folded norm has no leaves
            y = call(x, *args, **kwargs)
            if is_stored:
                found.setdefault(norm.path, _layer(norm, x, *args, **kwargs))
            return y

        def run(network: Network, batch: Batch) -> Any:
            # A model that ignores its flag also writes in evaluation.
            options: Any = {"dropout": jax.random.key(0), "mutable": ("batch_stats",)}
            variables = network.params, network.batch_stats, batch
            with nn.intercept_methods(only_norms(watch)):
                return run_unsynced(*variables, model=self.model, train=train, **options)

        jax.eval_shape(run, self, dict(batch))
        return tuple(found.values())


def linen(model: nn.Module, params: Params, batch_stats: Any, call: Call | None = None) -> Network:
    """Returns a linen model and its variables as a network for the functions of the clinic.

    Args:
        model: any linen module. `__call__` needs one of the training flags `train`, `training`,
            `is_training`, `deterministic` or `use_running_average`.
        params: its weights.
        batch_stats: its running statistics; for `audit` also statistics of several replicas.
        call: (model, images, train) -> logits, for a model with a different signature.

    Raises:
        ValueError: if there is no known flag and no `call`.

    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, deterministic):
    ...         return nn.BatchNorm(use_running_average=deterministic)(x).mean((1, 2))
    >>> variables = Net().init(jax.random.key(0), jnp.ones((2, 4, 4, 3)), True)
    >>> [norm.name for norm in linen(Net(), **variables).norms({"image": jnp.ones((2, 4, 4, 3))})]
    ['BatchNorm_0']
    """
    names = inspect.signature(type(model).__call__).parameters
    if call is None:
        flag = next((name for name in FLAGS if name in names), None)
        if flag is None:
            raise ValueError(
                f"{type(model).__name__}.__call__ has none of the arguments {', '.join(FLAGS)}. "
                "Give a function that calls it: clinic.linen(…, call=lambda model, x, train: …)."
            )
        if flag == "train":
            return Network(params, batch_stats, model)

        def call(module: Any, x: Images, train: bool) -> Any:
            return module(x, **{flag: train == FLAGS[flag]})

    return Network(params, batch_stats, Called(model, call))


class Called(nn.Module):
    """Gives a model the signature `__call__(x, train=...)`; its variables keep their names.

    Attributes:
        model: any linen module.
        call: (model, images, train) -> logits.
    """

    model: nn.Module
    call: Call

    @nn.compact
    def __call__(self, x: Images, *, train: bool) -> Any:
        """Returns the logits of images [n, h, w, c]."""
        return self.call(self.model.copy(parent=self.scope, name=None), x, train)


@dataclasses.dataclass(frozen=True)
class NormLayer:
    """One batch norm in one pass.

    Attributes:
        path: the path of its leaves in `batch_stats`.
        module: an unbound copy with its fields `epsilon`, `momentum`, …
        shape, dtype: the shape and dtype of its input.
        axes: the reduced axes.
        by_batch: whether this pass normalised by batch statistics.
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
        """The kind of variance in its average, "biased" or "unbiased"."""
        return getattr(self.module, "variance", "biased")


def _layer(norm: Any, x: Array, use_running_average: bool | None = None, **_: Any) -> NormLayer:
    by_running = nn.merge_param(
        "use_running_average", norm.use_running_average, use_running_average
    )
    chosen = "running" if getattr(norm, FROZEN, False) else getattr(norm, "statistics", None)
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


def only_norms(watch: Callable[..., Array]) -> Callable[..., Any]:
    """Returns an interceptor that passes only the calls of norms to `watch`."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        norm = context.module
        is_call = context.method_name == "__call__" and isinstance(norm, NORMS)
        # A subclass with a different signature calls its superclass, which is intercepted.
        if is_call and "use_running_average" in inspect.signature(context.orig_method).parameters:
            return watch(norm, call, *args, **kwargs)
        return call(*args, **kwargs)

    return intercept


@contextlib.contextmanager
def with_fields(module: nn.Module, **fields: Any) -> Iterator[None]:
    """Sets fields of a bound module, if it has them, until the context ends.

    A clone would be recorded as a second module, and bound modules reject normal assignment.
    """
    before = {name: getattr(module, name) for name in fields if hasattr(module, name)}
    try:
        for name in before:
            object.__setattr__(module, name, fields[name])
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)


def run_unsynced(*variables: Any, **options: Any) -> tuple[Logits, dict[str, Any]]:
    """Runs `bnjax.train_step.forward` with norms that do not sync over an axis.

    A model trained with `axis_name` can then run outside of that axis.
    """

    def unsynced(norm: nn.Module, call: Callable[..., Array], *args: Any, **kwargs: Any) -> Array:
        with with_fields(norm, axis_name=None, axis_index_groups=None, average_axis_name=None):
            return call(*args, **kwargs)

    with nn.intercept_methods(only_norms(unsynced)):
        return forward(*variables, **options)


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
    """Runs a batch; returns its logits, and `seen` merged with the moments of each norm's input.

    Moments are merged by count (Chan et al., 1979) in float32, and no activation is kept. Masked
    examples are excluded, whether or not the model takes masks.

    Args:
        params: the weights.
        batch_stats: the running statistics; "batch" uses only their shapes.
        seen: from `nothing_seen`, or from the previous batch.
        batch: `image` [n, h, w, c] and optionally `mask` bool [n].
        model: any linen module with `__call__(x, train=...)`.
        mode: how to run the network.
        dropout: the key for dropout, for "train".
        axis_name: the mapped axis or axes over which the moments are computed.

    Raises:
        ValueError: if a batch is padded and the input of a norm has no axis of examples.
    """
    mask, total = batch.get("mask"), total_over(axis_name)

    def watch(norm: Any, call: Callable[..., Array], x: Array, *args: Any, **kwargs: Any):
        if (before := seen_by(norm)) is None:
            return call(x, *args, **kwargs)
        given = moments_given(norm, x, kwargs.get("mask"), mask, total)
        if mode == "batch":
            for name in ("mean", "var"):
                dtype = norm.get_variable("batch_stats", name).dtype
                norm.put_variable("batch_stats", name, getattr(given, name).astype(dtype))
        y = call(x, *args, **kwargs)
        put_seen(norm, merge(before, given))
        return y

    options: Any = {"train": mode == "train", "dropout": dropout, "mutable": ("batch_stats",)}
    with nn.intercept_methods(only_norms(watch)):
        stats = with_seen(batch_stats, seen)
        logits, written = run_unsynced(params, stats, batch, model=model, **options)
    return logits, seen_in(written["batch_stats"], seen)


def nothing_seen(batch_stats: BatchStats) -> Seen:
    """Returns empty moments for each norm, the start value of `observe`."""
    leaves = flatten_dict(batch_stats)
    norms = [path for *path, name in leaves if name == "mean" and (*path, "var") in leaves]
    zeros = {(*path,): jnp.zeros(leaves[*path, "mean"].shape, jnp.float32) for path in norms}
    return {path: Moments(zero, zero, zero) for path, zero in zeros.items()}


def with_seen(batch_stats: BatchStats, seen: Seen) -> BatchStats:
    """Returns the statistics with additional leaves for the moments of a pass."""
    leaves = flatten_dict(batch_stats)
    for path, moments_ in seen.items():
        leaves |= {(*path, name): leaf for name, leaf in zip(_SEEN, moments_, strict=True)}
    return unflatten_dict(leaves)


def seen_in(batch_stats: BatchStats, paths: Iterable[tuple[str, ...]]) -> Seen:
    """Returns the moments in the leaves of `with_seen`, for the norms at these paths."""
    leaves = flatten_dict(batch_stats)
    return {path: Moments(*(leaves[*path, name] for name in _SEEN)) for path in paths}


def seen_by(norm: nn.Module) -> Moments | None:
    """Returns the moments of a bound norm so far; None if it has no such leaves."""
    if not norm.has_variable("batch_stats", _SEEN[0]):
        return None
    return Moments(*(norm.get_variable("batch_stats", name) for name in _SEEN))


def put_seen(norm: nn.Module, seen: Moments) -> None:
    """Stores the moments of a bound norm; after its call, in which a superclass may store too."""
    for name, leaf in zip(_SEEN, seen, strict=True):
        norm.put_variable("batch_stats", name, leaf)


def moments_given(
    norm: Any, x: Array, mask: Any, of_batch: Any = None, total: Total = lambda part: part
) -> Moments:
    """Returns the moments of the input of a bound norm, float32, in the shape of its `mean`.

    Args:
        norm: the norm, during its call.
        x: its input.
        mask: the mask of the call, or None.
        of_batch: the mask of the batch, used if `mask` is None.
        total: sums over devices.
    """
    axes = _reduced(norm, x)
    if mask is None and of_batch is not None:
        if 0 not in axes or x.shape[0] != of_batch.shape[0]:
            raise ValueError(
                f"the batch is padded, but the input of the norm {'.'.join(norm.path)}, {x.shape}, "
                f"does not have its {of_batch.shape[0]} examples along the first axis. Give "
                "batches without padding, or a model whose __call__ takes `mask`."
            )
        mask = of_batch
    mask = None if mask is None else full_mask(mask, x.shape, axes)
    given = moments(jnp.asarray(x, jnp.float32), axes, mask, total)
    shape = norm.get_variable("batch_stats", "mean").shape
    return Moments(*(jnp.broadcast_to(leaf, given.mean.shape).reshape(shape) for leaf in given))
