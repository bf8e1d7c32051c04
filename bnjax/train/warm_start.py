"""Starts a run from existing weights, and selects the leaves that training does not change."""

import dataclasses
import functools
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from bnjax.clinic.freezing import differing, matches
from bnjax.clinic.network import norm_paths
from bnjax.errors import ConfigError, UserError
from bnjax.train.jsonl import reading
from bnjax.train_step import TrainState
from bnjax.types import BatchStats, Params, Tree, named_leaves

Variables = tuple[Params, BatchStats]
HEAD = "logits"  # the last layer of every network in bnjax.models
WEIGHTS = "weights.safetensors"  # in a folder written by `bnjax export`


class Taken(NamedTuple):
    """The names of the leaves that were copied from a source network, and of the other leaves.

    Attributes:
        taken: leaves that were copied from the source.
        new: leaves that the source lacks or has with another shape.
        left: leaves of the source that the network lacks.
    """

    taken: tuple[str, ...]
    new: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        """Returns one line for each field, with layers instead of single leaves."""
        lines = [f"  {what}: {_layers(names)}" for what, names in self._asdict().items()]
        return "\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in lines)


def take_over(
    state: TrainState, batch_stats: BatchStats, source: Variables, tx: optax.GradientTransformation
) -> tuple[TrainState, BatchStats, Taken]:
    """Returns a new state with parameters and statistics copied from another network.

    Leaves are matched by name and shape, and keep the dtypes of `state`. The optimizer's state is
    initialised anew. Statistics are copied together with their `count`, if the norms have one.

    Args:
        state, batch_stats: the result of `bnjax.train_step.init_state`.
        source: the params and batch_stats of the other network.
        tx: the optimizer given to `init_state`.

    Raises:
        UserError: if the two networks have no parameter in common.
    """
    own = flatten_dict({"params": state.params, "batch_stats": batch_stats}, sep=".")
    theirs = flatten_dict(dict(zip(("params", "batch_stats"), source, strict=True)), sep=".")
    taken = [name for name in own if name in theirs and theirs[name].shape == own[name].shape]
    if not any(name.startswith("params.") for name in taken):
        raise UserError(
            f"the two networks have no parameter with the same name and shape: here "
            f"{_layers(own)}; there {_layers(theirs)}. Rename the layers, for instance with a "
            "table of names for bnjax port."
        )
    new = tuple(
        f"{name} {[*own[name].shape]}, there {[*theirs[name].shape]}" if name in theirs else name
        for name in own
        if name not in taken
    )
    leaves = own | {name: np.asarray(theirs[name], own[name].dtype) for name in taken}
    trees = unflatten_dict(leaves, sep=".")
    params, stats = trees.get("params", {}), trees.get("batch_stats", {})
    found = Taken(tuple(taken), new, tuple(sorted({*theirs} - {*own})))
    state = dataclasses.replace(state, params=params, opt_state=tx.init(params))
    return state, stats, found


def _layers(names: Iterable[str], most: int = 12) -> str:
    """Returns the layers of the named leaves in order, with any remark on a leaf in brackets."""
    parts = [name.partition(" ") for name in names]
    layers = dict.fromkeys(
        f"{name.removeprefix('batch_stats.').removeprefix('params.').rpartition('.')[0]}"
        + (f" ({name.rpartition('.')[2]} {more})" if more else "")
        for name, _, more in parts
    )
    shown = [*layers][:most]
    more = f" and {len(layers) - most} more layers" if len(layers) > most else ""
    return f"{len(parts)} leaves of {', '.join(shown)}{more}" if parts else "nothing"


@functools.lru_cache(1)
def read_source(folder: Path) -> Variables:
    """Returns the variables of a run or of a ported, folded or exported network.

    For a run, these are the variables that its best checkpoint stores for evaluation.

    Raises:
        UserError: if the folder holds no such network, or is damaged.
    """
    if (folder / WEIGHTS).is_file():
        with reading(folder / WEIGHTS):
            leaves = safetensors.numpy.load_file(folder / WEIGHTS)
            trees = unflatten_dict(leaves, sep=".")
            return trees["params"], trees.get("batch_stats", {})
    if not (folder / "config.json").is_file():
        raise UserError(
            f"--from {folder} holds neither a run nor an exported network. Give the folder of "
            "bnjax train, port, fold, precise or export."
        )
    from bnjax.train.trained import Trained

    trained = Trained(folder, "best")
    return trained.params, trained.batch_stats


class Frozen(NamedTuple):
    """The parts of a network that a run does not change.

    Attributes:
        norms: the names of the norms whose statistics are frozen.
        params: the names of the frozen parameters, including their layers.
    """

    norms: tuple[str, ...]
    params: tuple[str, ...]

    def mask(self, params: Params) -> Tree:
        """Returns a tree of bools like the tree of parameters, True for frozen parameters."""
        return unflatten_dict(
            {path: ".".join(path) in self.params for path in flatten_dict(params)}
        )

    def moved(self, before: Variables, after: Variables) -> list[str]:
        """Returns the names of frozen leaves that differ in any bit between the two networks."""
        return differing(self._leaves(before), self._leaves(after))

    def _leaves(self, variables: Variables) -> dict[str, Any]:
        params, stats = map(named_leaves, variables)
        own = {name: leaf for name, leaf in stats.items() if name.rpartition(".")[0] in self.norms}
        return {name: params[name] for name in self.params} | own


def frozen(config: ConfigDict, params: Params, batch_stats: BatchStats) -> Frozen:
    """Returns the parts of a network that the section `train` freezes.

    Args:
        config: the section `train` of the config.
        params, batch_stats: the variables of the network, or their shapes.

    Raises:
        ConfigError: if a pattern matches nothing, or nothing is left to train.
    """
    norms = [".".join(path) for path in norm_paths(batch_stats)]
    leaves = [".".join(path) for path in flatten_dict(params)]
    fixed: dict[str, list[str]] = {
        "norms": [name for name in leaves if name.rpartition(".")[0] in norms],
        "backbone": [name for name in leaves if name.split(".")[0] != HEAD],
    }
    stay = [] if config.freeze == "none" else norms
    chosen = []
    for key, what, names, own in (
        ("freeze_statistics", "norms", norms, stay),
        ("freeze_params", "parameters", leaves, fixed.get(config.freeze, [])),
    ):
        patterns = config[key]
        for pattern in patterns:
            if not any(_fits(name, [pattern]) for name in names):
                allowed = f"patterns for the names of {what}: {', '.join(names) or 'none'}"
                raise ConfigError(f"train.{key}", pattern, allowed)
        chosen.append(tuple(name for name in names if name in own or _fits(name, patterns)))
    if leaves and len(chosen[1]) == len(leaves):
        allowed = "patterns that leave at least one parameter to train"
        raise ConfigError("train.freeze_params", tuple(config.freeze_params), allowed)
    return Frozen(*chosen)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    """Returns whether the name of a leaf, or of a layer that contains it, matches a pattern."""
    parts = name.split(".")
    return any(matches(".".join(parts[:end]), patterns) for end in range(1, len(parts) + 1))
