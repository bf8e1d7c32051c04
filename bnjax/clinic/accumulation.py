"""A training step with gradient accumulation over micro-batches."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.linen import intercepting
from bnjax.clinic.network import Call, nothing_seen, seen_in, with_seen
from bnjax.compat import varying
from bnjax.loss import LossFn, softmax_cross_entropy
from bnjax.metrics import Metrics
from bnjax.norms.moments import Moments, merge, merge_over, total_over
from bnjax.norms.running_average import Averages, updated_average
from bnjax.train_step import (
    AxisName,
    TrainState,
    count_of,
    descend,
    dropout_key,
    loss_of,
    train_step,
)
from bnjax.types import Batch, BatchStats, Params

# Maps the path of a norm's leaves to the norm, for all norms that update their averages.
Norms = dict[tuple[str, ...], Any]
# Defaults for fields that Flax's BatchNorm lacks; they reproduce its behaviour.
CONVENTIONS: dict[str, Any] = {"debias": False, "variance": "biased", "average_dtype": None}


def accumulated_step(
    state: TrainState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    micro_batches: int,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: LossFn = softmax_cross_entropy,
    axis_name: AxisName = None,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, BatchStats, Metrics]:
    """Takes a step like `train_step`, but keeps the activations of only one micro-batch in memory.

    The gradient is averaged, and the metrics are summed, over all unmasked examples of the batch.
    Each micro-batch is normalised by its own statistics, over the devices that the `axis_name` of
    each norm defines, so the gradient differs from the gradient of a step on the whole batch.
    The running averages are updated once, with the mean and variance over all micro-batches.

    Micro-batch i contains the examples i, i + k, i + 2 k, …, so sharded examples stay on their
    devices, and `jax.jit`, `jax.pmap` and `jax.shard_map` form the same micro-batches. The dropout
    key of micro-batch i is `fold_in(key of the step, i)`. With one micro-batch the result equals
    the result of `train_step` bit for bit.

    Args:
        state, batch_stats, model, tx, loss_fn, axis_name, skip_nonfinite: as for `train_step`.
            In norms other than the BatchNorm of Flax or bnjax, each floating-point statistic
            becomes the mean of its values after the micro-batches, weighted by counts; each integer
            becomes its value after the last micro-batch.
        batch: as for `train_step`; the number of examples on each shard of `axis_name` must be a
            multiple of `micro_batches`.
        micro_batches: the number k of micro-batches.

    Raises:
        ValueError: if the number of examples is not a multiple of `micro_batches`.
    """
    rows = batch["label"].shape[0]
    if micro_batches < 1 or rows % micro_batches:
        raise ValueError(
            f"a batch of {rows} examples (on each shard of a mapped axis) cannot be split into "
            f"{micro_batches} equal micro-batches. Choose a divisor of the number of examples, or "
            "add examples with a `mask` of False."
        )
    options: Any = {"model": model, "tx": tx, "loss_fn": loss_fn, "axis_name": axis_name}
    if micro_batches == 1:
        return train_step(state, batch_stats, batch, **options, skip_nonfinite=skip_nonfinite)

    total, key = count_of(batch, axis_name), dropout_key(state, axis_name)
    params, norms = varying(state.params, axis_name), Norms()
    nothing = nothing_seen(batch_stats)
    start = with_seen(batch_stats, nothing)

    def one(params: Params, i: Any) -> _Found:
        micro = {name: _micro_batch(leaf, i, micro_batches) for name, leaf in batch.items()}
        loss = loss_of(start, micro, model, loss_fn, jax.random.fold_in(key, i), total)
        with nn.intercept_methods(intercepting(functools.partial(_watch, norms))):
            grads, (written, metrics) = jax.grad(loss, has_aux=True)(params)
        seen = seen_in(written, nothing)
        return _Found(grads, metrics, written, seen, count_of(micro, axis_name))

    def more(i: Any, found: _Found) -> _Found:
        # An artificial dependency of the next micro-batch on the previous gradients. Without this
        # dependency XLA would run all micro-batches in parallel, with all activations in memory.
        done = sum(jnp.ravel(leaf)[0] for leaf in jax.tree.leaves(found.grads))
        return found.merge(one(params, jnp.where(done < -jnp.inf, 0, i)))

    # The first result is the initial carry. The loop is unrolled on CPUs, where loops are slow.
    unroll = jax.default_backend() == "cpu"
    found = jax.lax.fori_loop(1, micro_batches, more, one(params, 0), unroll=unroll)
    stats = _updated(batch_stats, found, norms)
    of_all = found.grads, (stats, found.metrics)
    return descend(state, batch_stats, of_all, tx, axis_name, skip_nonfinite)


@struct.dataclass
class _Found:
    """The results of one or more micro-batches.

    Attributes:
        grads: the gradient of the summed losses, divided by the number of unmasked examples in the
            whole batch.
        metrics: the summed metrics.
        stats: the mean of the updated statistics, weighted by `count`.
        seen: for each norm that updates its running averages, the moments of its inputs.
        count: the number of unmasked examples on all devices.
    """

    grads: Params
    metrics: Metrics
    stats: BatchStats
    seen: Any
    count: Any

    def merge(self, other: "_Found") -> "_Found":
        """Merges these results with the results of other micro-batches."""
        count = self.count + other.count
        share = other.count / jnp.maximum(count, 1)

        def mean(mine: Any, its: Any) -> Any:
            if not jnp.issubdtype(its.dtype, jnp.inexact):
                return its
            both = mine + (its - mine) * share.astype(its.dtype)
            # A micro-batch of only padding may produce NaN.
            return jnp.where(share == 0, mine, jnp.where(share == 1, its, both))

        return _Found(
            jax.tree.map(jnp.add, self.grads, other.grads),
            self.metrics.merge(other.metrics),
            jax.tree.map(mean, self.stats, other.stats),
            {path: merge(moments, other.seen[path]) for path, moments in self.seen.items()},
            count,
        )


def _micro_batch(leaf: Any, i: Any, micro_batches: int) -> Any:
    rows = jnp.asarray(leaf).reshape(-1, micro_batches, *leaf.shape[1:])
    return jax.lax.dynamic_index_in_dim(rows, i, 1, keepdims=False)


def _watch(norms: Norms, call: Call) -> Any:
    """Calls a norm; stores the moments of the input if the norm updates its averages."""
    if (before := call.seen) is None:
        return call()
    average = call.get("mean")
    y = call()
    if call.get("mean") is not average:
        norms[call.path] = call.module.clone(parent=None, name=None)
        call.see(merge(before, jax.lax.stop_gradient(call.moments())))
    return y


def _updated(batch_stats: BatchStats, found: _Found, norms: Norms) -> BatchStats:
    """Returns the statistics after one update with the merged moments of all micro-batches."""
    old, new = flatten_dict(batch_stats), flatten_dict(found.stats)
    leaves = {path: new[path] for path in old}
    for path, norm in norms.items():
        given: Moments = found.seen[path]
        if norm.axis_name is not None:
            given = merge_over(given, total_over(norm.axis_name, norm.axis_index_groups))
        if (further := getattr(norm, "average_axis_name", None)) is not None:
            given = merge_over(given, total_over(further))
        names = [(*path, name) for name in ("mean", "var", "count")]
        averages = Averages(*(old.get(name) for name in names))
        conventions = [getattr(norm, name, default) for name, default in CONVENTIONS.items()]
        values = updated_average(averages, given, norm.momentum, *conventions, masked=True)
        leaves |= {name: leaf for name, leaf in zip(names, values, strict=True) if name in old}
    return unflatten_dict(leaves)
