"""Running statistics that several devices have kept apart, made one set."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.types import Array, BatchStats


def merge_replicas(batch_stats: BatchStats, counts: Array | None = None) -> BatchStats:
    """Returns the statistics of what all replicas have seen, to evaluate and to save.

    Each norm's mean is the mean of the means, its variance the mean of the variances plus the
    variance of the means: averaging the variances alone (`jax.lax.pmean` of the collection) leaves
    the latter out, and statistics of one replica are those of its shard. Other numbers are
    averaged; whole numbers, as the count of updates, have to agree.

    Args:
        batch_stats: with a leading axis of the replicas in every leaf, as a loop under `jax.pmap`
            has them whose norms do not sync; from several processes, those of all.
        counts: real examples that each replica has seen [replicas]; None: all as many.

    Raises:
        ValueError: if the leaves are not of as many replicas each, `counts` does not go with them
            or adds up to nothing, or a whole number differs between replicas.

    >>> stats = {"norm": {"mean": jnp.array([[0.0], [4.0]]), "var": jnp.array([[1.0], [3.0]])}}
    >>> merged = merge_replicas(stats)["norm"]
    >>> print(merged["mean"], merged["var"])
    [2.] [6.]
    """
    leaves = flatten_dict(batch_stats)
    sizes: set[Any] = {leaf.shape[0] if leaf.ndim else None for leaf in leaves.values()}
    if len(sizes) > 1 or None in sizes:
        raise ValueError(
            "every leaf of the statistics needs a leading axis of the replicas, and they have "
            f"{sorted(map(str, sizes))} of them. Give what jax.pmap returns, not one replica's."
        )
    shares = np.ones(max(sizes, default=1)) if counts is None else np.asarray(counts, float)
    if sizes and shares.shape != (*sizes,):
        raise ValueError(f"counts of shape {shares.shape} do not go with {max(sizes)} replicas")
    if not (shares >= 0).all() or not shares.sum() > 0:
        raise ValueError(f"counts = {counts} are of no example: they are 0 or above, and not all 0")

    shares = shares / shares.sum()

    def average(leaf: Any) -> Array:
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        by_replica = jnp.asarray(shares.reshape(-1, *[1] * (leaf.ndim - 1)), wide)
        # Whatever a replica holds that has seen nothing, NaN included.
        return jnp.where(by_replica > 0, jnp.asarray(leaf, wide) * by_replica, 0).sum(0)

    merged: dict[tuple[str, ...], Any] = {}
    for path, leaf in leaves.items():
        *norm, name = path
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            if (np.asarray(leaf) != np.asarray(leaf)[:1]).any():
                raise ValueError(
                    f"{'.'.join(path)} differs between replicas, {np.unique(np.asarray(leaf))}: "
                    "they have taken different numbers of steps, and there is no one average"
                )
            merged[path] = jnp.asarray(leaf)[0]
            continue
        merged[path] = average(leaf)
        if name == "var" and (*norm, "mean") in leaves:
            means = jnp.asarray(leaves[*norm, "mean"])
            merged[path] += average(jnp.square(means - average(means)[None]))
        merged[path] = merged[path].astype(leaf.dtype)
    return unflatten_dict(merged)
