"""Computes precise statistics, compares them with stored statistics, and merges replicas."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.network import (
    SUPPORTED,
    Mode,
    Network,
    NormLayer,
    SameNetwork,
    Seen,
    norm_paths,
    nothing_seen,
)
from bnjax.loss import LossFn, softmax_cross_entropy
from bnjax.metrics import Metrics, from_losses
from bnjax.types import Array, Batch, BatchStats, Logits

By = Literal["batch", "population"]
# Passes are repeated until the largest change of a statistic is below the tolerance.
TOLERANCE = 1e-6
MAX_PASSES = 200


def precise(
    network: SameNetwork,
    batches: Iterable[Batch],
    *,
    by: By = "batch",
    keep: float = 0.0,
    jit: Callable[..., Any] = jax.jit,
) -> SameNetwork:
    """Replaces the running averages of each norm by the mean and variance over all examples.

    All other leaves are unchanged. The method is that of Wu & Johnson (2021, section 3). Batches
    are weighted by the number of examples, so their sizes only affect the batch statistics used
    with by="batch". Masked examples are excluded, and dropout is off. Only one batch at a time is
    in memory. An average of unbiased variances is replaced by the unbiased variance.

    Args:
        network: a network whose norms are its library's own BatchNorm or bnjax's.
        batches: an iterable of batches with `image` [n, h, w, c] and optionally `mask` bool [n];
            by="population" needs a repeatable iterable, such as a list.
        by: the statistics by which the earlier norms normalise. "batch": batch statistics, as in
            training; takes one pass. "population": the precise statistics, as in evaluation; takes
            one pass for each norm in the longest chain, and one more to confirm the result.
        keep: the weight of the stored means and variances in the result, 0 to 1 (Schneider et al.,
            2020, section 3); with "population", earlier norms also normalise by this mixture.
        jit: the function used for compilation.

    Raises:
        ValueError: if there are no examples, a norm has only masked values, `keep` is invalid, or
            `batches` is not repeatable.
    """
    if by not in get_args(By):
        raise ValueError(f"by = {by!r} is invalid: it must be 'batch' or 'population'")
    if not network.batch_stats:
        raise ValueError(
            "the network has no running statistics. For a model with batch norms, take batch_stats "
            "from model.init: clinic.linen(model, params, batch_stats)."
        )
    if not 0 <= keep <= 1:
        raise ValueError(f"keep = {keep} is invalid: it must be a fraction from 0 to 1")
    remaining = iter(batches)
    if by == "population" and remaining is batches:
        raise ValueError("by='population' iterates over `batches` several times: give a list")
    if (first := next(remaining, None)) is None:
        raise ValueError("there is no batch")
    if remaining is batches:
        batches = itertools.chain([first], remaining)
    layers, old = network.norms(first), network.batch_stats
    if not layers:
        raise ValueError(
            f"there are no statistics to recompute: this needs {SUPPORTED} in the network"
        )

    def once(batch_stats: BatchStats, mode: Mode) -> BatchStats:
        seen, now = nothing_seen(old), dataclasses.replace(network, batch_stats=batch_stats)
        for batch in batches:
            _, seen = passes[mode](now, seen, batch)
        return put(old, seen, layers, keep)

    modes: tuple[Mode, ...] = ("batch", "running")
    passes = {mode: jit(functools.partial(type(network).observe, mode=mode)) for mode in modes}
    found = once(old, "batch")
    if by == "population":
        # After k passes the first k norms are exact. A norm with two calls depends on itself; its
        # statistics converge to a fixed point.
        for _ in range(MAX_PASSES):
            before, found = found, once(found, "running")
            if _change(before, found) < TOLERANCE:
                break
    return dataclasses.replace(network, batch_stats=found)


def put(
    batch_stats: BatchStats, seen: Seen, layers: Iterable[NormLayer], keep: float = 0.0
) -> BatchStats:
    """Returns running statistics with the observed means and variances.

    Args:
        batch_stats: the old statistics, the source of all other leaves.
        seen: the moments from `Network.observe`.
        layers: the norms from `Network.norms`; they define which variances are
            biased.
        keep: the weight of the old means and variances. Variances are averaged without a term for
            the distance between the means.

    Raises:
        ValueError: if a norm has only masked values.
    """
    leaves = flatten_dict(batch_stats)
    for layer in layers:
        mean, var, count = seen[layer.path]
        if not np.all(np.asarray(count) > 0):
            raise ValueError(
                f"the norm {layer.name} has no unmasked inputs, so its mean is undefined. Give at "
                "least one unmasked example, and a model that keeps the updates of its norms."
            )
        if layer.variance == "unbiased":
            var = var * (count / jnp.maximum(count - 1, 1))
        for name, new in (("mean", mean), ("var", var)):
            old = leaves[*layer.path, name]
            both = keep * old + (1 - keep) * new if keep else new
            leaves[*layer.path, name] = both.astype(old.dtype)
    return unflatten_dict(leaves)


def _change(before: BatchStats, after: BatchStats) -> float:
    """Returns the largest change of a mean (in standard deviations) or of a log variance."""
    old, new = flatten_dict(before), flatten_dict(after)
    changes = [0.0]
    for path in norm_paths(after):
        mean, var = (*path, "mean"), (*path, "var")
        found = deviations(old[mean], old[var], new[mean], new[var], 1e-12)
        changes += [float(np.abs(leaf).max()) for leaf in found]
    return max(changes)


class Gap(NamedTuple):
    """The metrics of one batch under running statistics and under batch statistics.

    Attributes:
        stored: the metrics under the running statistics.
        batch: the metrics under the batch statistics, without dropout.
        seen: the batch statistics, for `put`.
    """

    stored: Metrics
    batch: Metrics
    seen: Seen


class Drift(NamedTuple):
    """The difference between the stored and the true statistics of one norm.

    Epsilon is added to all variances, so the drift is the error of the norm's output. The true
    statistics have sampling noise: if they are computed from n images, the `mean` after a dense
    layer is about 1/sqrt(n) even for correct averages.

    Attributes:
        mean: (stored - true mean) / true standard deviation, the root mean square over channels.
        variance: log(stored / true variance), the mean over channels. If it is above 0, the norm's
            output is too small in evaluation; if it is below 0, too large.
    """

    mean: float
    variance: float


def gap(network: Network, batch: Batch, loss_fn: LossFn = softmax_cross_entropy) -> Gap:
    """Evaluates one batch under the running statistics and under its batch statistics.

    This function can be compiled by `jax.jit`. The batch has `image` [n, h, w, c], `label` int [n]
    and optionally `mask` bool [n].
    """

    def metrics(logits: Logits) -> Metrics:
        losses = loss_fn(logits, batch["label"])
        return from_losses(losses, logits, batch["label"], batch.get("mask"))

    logits, seen = network.observe(nothing_seen(network.batch_stats), batch, mode="batch")
    return Gap(metrics(network.run(batch, train=False)[0]), metrics(logits), seen)


def deviations(mean: Any, var: Any, true_mean: Any, true_var: Any, epsilon: float) -> Any:
    """Returns the errors of stored statistics for each channel, float64.

    The results are the error of the mean in true standard deviations, and the natural log of the
    ratio of the variances. Epsilon is added to both variances. A negative variance gives NaN.
    """
    mean, var, true_mean, true_var = (
        np.asarray(leaf, np.float64) for leaf in (mean, var, true_mean, true_var)
    )
    scale = true_var + epsilon
    with np.errstate(invalid="ignore", divide="ignore"):
        return (mean - true_mean) / np.sqrt(scale), np.log((var + epsilon) / scale)


def drift(stored: BatchStats, true: BatchStats, layers: Iterable[NormLayer]) -> dict[str, Drift]:
    """Returns a dict of drifts keyed by norm; a stack in `nn.scan` or `nn.vmap` is one norm.

    Args:
        stored: the running statistics.
        true: the precise statistics of the same network.
        layers: the norms, from `Network.norms`.
    """
    its, own = flatten_dict(stored), flatten_dict(true)

    def of(layer: NormLayer) -> Drift:
        mean, var = (*layer.path, "mean"), (*layer.path, "var")
        shift, ratio = deviations(its[mean], its[var], own[mean], own[var], layer.module.epsilon)
        return Drift(float(np.sqrt(np.square(shift).mean())), float(ratio.mean()))

    return {layer.name: of(layer) for layer in layers}


def merge_replicas(batch_stats: BatchStats, counts: Array | None = None) -> BatchStats:
    """Merges the running statistics of replicas that were trained without synchronisation.

    Each mean is the mean over replicas; each variance is the mean of the variances plus the
    variance of the means, which `jax.lax.pmean` would omit. Other floating-point leaves are
    averaged. Integers, such as the number of updates, must be equal.

    Args:
        batch_stats: statistics whose leaves have a leading axis of replicas, as from `jax.pmap`,
            with the replicas of all processes.
        counts: the number of unmasked examples per replica, [replicas]; None for equal numbers.

    Raises:
        ValueError: if the leaves have different numbers of replicas, `counts` has a wrong shape or
            value, or an integer differs between replicas.

    >>> stats = {"norm": {"mean": jnp.array([[0.0], [4.0]]), "var": jnp.array([[1.0], [3.0]])}}
    >>> merged = merge_replicas(stats)["norm"]
    >>> print(merged["mean"], merged["var"])
    [2.] [6.]
    """
    leaves = {path: np.asarray(leaf) for path, leaf in flatten_dict(batch_stats).items()}
    sizes = {leaf.shape[:1] for leaf in leaves.values()}
    if len(sizes) > 1 or () in sizes:
        raise ValueError(
            "every leaf of the statistics needs a leading axis with one entry per replica, but "
            f"the leading axes have the sizes {sorted(sizes)}. Give the statistics that jax.pmap "
            "returns."
        )
    size = max(sizes, default=(1,))
    shares = np.ones(size) if counts is None else np.asarray(counts, float)
    if shares.shape != size or not (shares >= 0).all() or not shares.sum() > 0:
        raise ValueError(
            f"counts = {counts} must be {size[0]} non-negative numbers, one per replica, and not "
            "all 0"
        )

    def average(leaf: np.ndarray) -> np.ndarray:
        some = shares > 0  # a replica without examples may hold NaN
        return np.average(np.float64(leaf[some]), 0, shares[some])

    merged: dict[tuple[str, ...], Any] = {}
    for path, leaf in leaves.items():
        *norm, name = path
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            found = average(leaf)
            if name == "var" and (*norm, "mean") in leaves:
                means = leaves[*norm, "mean"]
                found += average(np.square(means - average(means)))
        elif (leaf != (found := leaf[0])).any():
            raise ValueError(
                f"{'.'.join(path)} differs between replicas ({np.unique(leaf)}), so the "
                "replicas were trained for different numbers of steps"
            )
        merged[path] = jnp.asarray(found, leaf.dtype)
    return unflatten_dict(merged)
