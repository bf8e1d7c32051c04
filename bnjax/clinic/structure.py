"""Whether parameters and statistics are those of the model, one replica or several."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.findings import Finding
from bnjax.clinic.limits import limit
from bnjax.train_step import init_variables
from bnjax.types import BatchStats, Images, Params

Leaves = dict[tuple[str, ...], Any]


class Settled(NamedTuple):
    """Variables as the model takes them.

    Attributes:
        params: the weights, without leaves that the model lacks.
        batch_stats: likewise, of the first replica if there are several.
        found: what was wrong with them.
        usable: whether the model can be run with them.
    """

    params: Params
    batch_stats: BatchStats
    found: tuple[Finding, ...]
    usable: bool


def settle(model: nn.Module, params: Params, batch_stats: Any, images: Images) -> Settled:
    """Returns the variables of one replica, matched with the model's.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        params: its weights, perhaps with a leading axis of devices.
        batch_stats: its statistics; perhaps with such an axis, or a list of one for each replica,
            or replicated arrays whose copies differ.
        images: [n, h, w, c]; only shape and dtype matter.
    """
    shapes = jax.eval_shape(functools.partial(init_variables, model, jax.random.key(0)), images[:1])
    wanted_params, wanted_stats = (flatten_dict(dict(tree)) for tree in shapes)
    (its_params, *_) = _replicas(params, wanted_params)
    replicas = _replicas(batch_stats, wanted_stats)
    its_stats = replicas[0]
    if wanted_stats and not its_stats:
        text = f"the model has {len(wanted_stats)} leaves in batch_stats, the checkpoint none"
        return Settled(params, batch_stats, (Finding("missing-statistics", (), text),), False)

    found = []
    lines = [*_unmatched("params", its_params, wanted_params)]
    lines += _unmatched("batch_stats", its_stats, wanted_stats)
    if lines:
        more = f" and {len(lines) - 8} more" if len(lines) > 8 else ""
        found.append(Finding("unmatched-leaves", (), "; ".join(lines[:8]) + more))
    usable = all(
        path in leaves and np.shape(leaves[path]) == leaf.shape
        for leaves, wanted in ((its_params, wanted_params), (its_stats, wanted_stats))
        for path, leaf in wanted.items()
    )
    if usable and len(replicas) > 1:
        found += _differing(replicas)
    mine, stats = (
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path in wanted})
        for leaves, wanted in ((its_params, wanted_params), (its_stats, wanted_stats))
    )
    return Settled(mine, stats, tuple(found), usable)


def _replicas(tree: Any, wanted: Leaves) -> list[Leaves]:
    """Returns the leaves of each replica."""
    if isinstance(tree, list | tuple):
        return [_replicas(one, wanted)[0] for one in tree] or [{}]
    leaves: Leaves = flatten_dict(dict(tree)) if isinstance(tree, Mapping) else {}
    devices = {np.shape(leaf)[:1] for leaf in leaves.values()}
    stacked = all(
        path in wanted and np.shape(leaf)[1:] == wanted[path].shape and np.ndim(leaf) > 0
        for path, leaf in leaves.items()
    ) and any(np.shape(leaf) != wanted[path].shape for path, leaf in leaves.items())
    if stacked and len(devices) == 1:
        ((count,),) = devices
        host = jax.device_get(leaves)
        return [{path: leaf[i] for path, leaf in host.items()} for i in range(count)]
    copies = [_copies(leaf) for leaf in leaves.values()]
    count = min((len(of_leaf) for of_leaf in copies), default=1)
    if count < 2:
        return [leaves]
    return [
        {path: of_leaf[i] for path, of_leaf in zip(leaves, copies, strict=True)}
        for i in range(count)
    ]


def _copies(leaf: Any) -> list[Any]:
    """Returns the devices' copies of a replicated array, which may be unlike after `shard_map`."""
    if not isinstance(leaf, jax.Array) or not leaf.sharding.is_fully_replicated:
        return [leaf]
    return [np.asarray(shard.data) for shard in leaf.addressable_shards]


def _unmatched(collection: str, leaves: Leaves, wanted: Leaves) -> list[str]:
    lines = []
    for path in sorted({*leaves, *wanted}):
        name = f"{collection}.{'.'.join(path)}"
        if path not in leaves:
            lines.append(f"{name} is missing")
        elif path not in wanted:
            lines.append(f"{name} is nothing of the model's")
        elif np.shape(leaves[path]) != wanted[path].shape:
            there, here = np.shape(leaves[path]), wanted[path].shape
            lines.append(f"{name} is {[*there]} where the model has {[*here]}")
    return lines


def _differing(replicas: list[Leaves]) -> list[Finding]:
    layers: list[str] = []
    most_mean = most_var = 0.0
    for *path, name in replicas[0]:
        if name != "mean" or (*path, "var") not in replicas[0]:
            continue
        mean, var = (
            np.stack([np.asarray(leaves[*path, leaf], np.float64) for leaves in replicas])
            for leaf in ("mean", "var")
        )
        std = np.sqrt(np.maximum(var.mean(0), 1e-12))
        apart = float(np.nan_to_num(np.ptp(mean, axis=0) / std, nan=np.inf).max())
        logs = np.log(np.maximum(var, 1e-12))
        ratio = float(np.nan_to_num(np.ptp(logs, axis=0), nan=np.inf).max())
        if max(apart, ratio) > limit("replicas"):
            layers.append(".".join(path))
            most_mean, most_var = max(most_mean, apart), max(most_var, ratio)
    if not layers:
        return []
    text = (
        f"{len(replicas)} replicas, whose means are up to {most_mean:.3g} standard deviations "
        f"apart and whose log variances up to {most_var:.3g}; the first is looked at below"
    )
    return [Finding("replicas-differ", tuple(layers), text)]
