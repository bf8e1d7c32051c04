"""Precise batch norm: statistics of many examples at fixed weights (Wu & Johnson, 2021)."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.layers import Mode, NormLayer, Seen, norm_layers, nothing_seen, observe
from bnjax.train_step import init_variables
from bnjax.types import Batch, BatchStats, Params

By = Literal["batch", "population"]
# Passes end when the largest relative change is below the tolerance.
TOLERANCE = 1e-6
MAX_PASSES = 200


def precise(
    model: nn.Module,
    params: Params,
    batches: Iterable[Batch],
    batch_stats: BatchStats | None = None,
    *,
    by: By = "batch",
    keep: float = 0.0,
    jit: Callable[..., Any] = jax.jit,
) -> BatchStats:
    """Returns the mean and variance of all examples at every norm, instead of running averages.

    Pooled over the batches by how many values each has: the result does not depend on how the
    examples were divided up, but for what `by` says. Where `mask` is False the example counts for
    nothing. Units are not dropped, since evaluation drops none. No activation is kept, so that
    memory is that of one batch. An average that stores the unbiased variance gets that.

    Args:
        model: any linen module whose norms are Flax's or bnjax's BatchNorm.
        params: its weights.
        batches: `image` [n, h, w, c] and optionally `mask` bool [n]; any iterable for "batch", and
            one that can be gone through several times, as a list, for "population".
        batch_stats: gives the leaves that are no mean or variance; None: untrained ones.
        by: what normalises the layers before the one whose statistics are taken. "batch": each
            batch's own, as in training; one pass (section 3.2 of the paper). "population": the
            precise statistics, as in evaluation; as many passes as norms stand behind one another.
        keep: the fraction of `batch_stats` that stays in every mean and variance, as `mixed` says;
            under "population" the layers before are normalised by what it leaves, too.
        jit: compiles a function.

    Raises:
        ValueError: if there is no example, a norm was given no value, or `batches` cannot be gone
            through again.
    """
    if by == "population" and iter(batches) is batches:
        raise ValueError(
            "by='population' goes through the batches several times, and these can be gone "
            "through only once. Give a list of them."
        )
    first, batches = _first(batches)
    if batch_stats is None:
        _, batch_stats = init_variables(model, jax.random.key(0), np.asarray(first["image"][:1]))
    layers = norm_layers(model, params, batch_stats, first, train=False)

    passes: dict[Mode, Any] = {
        mode: jit(functools.partial(observe, model=model, mode=mode))
        for mode in ("batch", "running")
    }

    def once(batch_stats: BatchStats, mode: Mode) -> BatchStats:
        seen = nothing_seen(batch_stats)
        for batch in batches:
            _, seen = passes[mode](params, batch_stats, seen, batch)
        return put(batch_stats, seen, layers)

    old = batch_stats
    found = mixed(old, once(old, "batch"), keep)
    if by == "batch":
        return found
    # After k passes the first k layers are exact, whatever they began with. A layer that is called
    # twice depends on itself: there it is an equation that the passes come ever nearer to.
    for _ in range(MAX_PASSES):
        before, found = found, mixed(old, once(found, "running"), keep)
        if _change(before, found) < TOLERANCE:
            break
    return found


def put(batch_stats: BatchStats, seen: Seen, layers: Iterable[NormLayer]) -> BatchStats:
    """Returns the running statistics with what the norms have seen in the place of the averages.

    Args:
        batch_stats: other leaves than means and variances are taken from it.
        seen: from `observe`.
        layers: from `norm_layers`; they say what each average stores.

    Raises:
        ValueError: if a norm of the model was given no value.
    """
    leaves = flatten_dict(batch_stats)
    for layer in layers:
        mean, var, count = seen[layer.path]
        if not np.all(np.asarray(count) > 0):
            raise ValueError(
                f"the norm {layer.name} was given no value, so it has no mean. Give at least one "
                "batch with an example that its mask does not leave out."
            )
        if layer.variance == "unbiased":
            var = var * (count / jnp.maximum(count - 1, 1))
        for name, leaf in (("mean", mean), ("var", var)):
            leaves[*layer.path, name] = leaf.astype(leaves[*layer.path, name].dtype)
    return unflatten_dict(leaves)


def mixed(old: BatchStats, new: BatchStats, keep: float) -> BatchStats:
    """Returns keep * old + (1 - keep) * new of every mean and variance; other leaves are of `new`.

    Variances are averaged as they are, without the distance between the means: so the paper has it
    (Schneider et al., 2020, section 3).

    Raises:
        ValueError: if `keep` is not from 0 to 1.

    >>> old, new = ({"norm": {"mean": jnp.array([m]), "var": jnp.ones(1)}} for m in (0.0, 4.0))
    >>> print(mixed(old, new, 0.75)["norm"]["mean"])
    [1.]
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep = {keep} is not possible: it is a fraction, from 0 to 1")
    before, leaves = flatten_dict(old), flatten_dict(new)
    for path in nothing_seen(new):
        for name in ("mean", "var"):
            leaf = leaves[*path, name]
            both = keep * before[*path, name] + (1 - keep) * leaf
            leaves[*path, name] = both.astype(leaf.dtype) if keep else leaf
    return unflatten_dict(leaves)


def _first(batches: Iterable[Batch]) -> tuple[Batch, Iterable[Batch]]:
    """Returns the first batch, and all of them; what can be gone through again still can be."""
    remaining = iter(batches)
    first = next(remaining, None)
    if first is None:
        raise ValueError("there is no batch to take statistics of")
    return first, itertools.chain([first], remaining) if remaining is batches else batches


def _change(before: BatchStats, after: BatchStats) -> float:
    """Returns the largest change of a mean, in standard deviations, or of a variance, relative."""
    old, new = flatten_dict(before), flatten_dict(after)
    changes: list[Any] = [0.0]
    for path in nothing_seen(after):
        mean, var = new[*path, "mean"], jnp.maximum(new[*path, "var"], 1e-12)
        changes.append(jnp.max(jnp.abs(mean - old[*path, "mean"]) / jnp.sqrt(var)))
        changes.append(jnp.max(jnp.abs(var - old[*path, "var"]) / var))
    return float(max(changes))
