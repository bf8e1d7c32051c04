"""Checkpoints with Orbax: everything that a run needs to go on, the newest two and the best kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from bnjax.arrays import BatchStats, Params
from bnjax.errors import UserError
from bnjax.train_step import TrainState


class CheckpointError(UserError):
    """A checkpoint is missing or does not fit the model."""


class Checkpoints:
    """The checkpoints of one run, in a folder with one subfolder a step.

    Each holds two items: "variables" (params, batch_stats), all that evaluation needs, and "training" (opt_state,
    step, rng). Saving happens in the background; leaving the context waits until everything is on disk.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Opens the folder, creating it unless `read_only`."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports each of its settings as a warning
        self.folder = folder
        accuracy: Callable[[Any], float] = lambda metrics: metrics["accuracy"]  # noqa: E731
        best = preservation_policy.BestN(get_metric_fn=accuracy, n=1, keep_checkpoints_without_metrics=False)
        keep = preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(2), best])
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else keep, best_fn=accuracy, best_mode="max", read_only=read_only
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("variables", "training")}
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Returns the steps that there are checkpoints of, in ascending order."""
        return sorted(self._manager.all_steps())

    def step(self, which: str) -> int:
        """Returns the step that `which` ("best", "last" or a number) means.

        Raises:
            CheckpointError: if there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"there is no checkpoint in {self.folder}. Training saves the first one at its first evaluation.")
        if which == "last":
            return steps[-1]
        if which == "best":
            best = self._manager.best_step()
            return steps[-1] if best is None else best
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise CheckpointError(f"there is no checkpoint {which!r} in {self.folder}. Allowed: best, last, {', '.join(map(str, steps))}.")

    def save(self, state: TrainState, batch_stats: BatchStats, accuracy: float | None) -> None:
        """Saves under the state's step; `accuracy` decides which is the best, None for a step that was not evaluated."""
        step = int(state.step)
        if step in self.steps():
            return
        variables = {"params": state.params, "batch_stats": batch_stats}
        training = {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}
        args = ocp.args.Composite(variables=ocp.args.StandardSave(variables), training=ocp.args.StandardSave(training))
        self._manager.save(step, args=args, metrics=None if accuracy is None else {"accuracy": accuracy})

    def restore(self, step: int, like: tuple[TrainState, BatchStats]) -> tuple[TrainState, BatchStats]:
        """Returns the state and the statistics of a step; `like` gives the tree, the shapes and the dtypes."""
        state, batch_stats = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        training = {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}
        variables = {"params": state.params, "batch_stats": batch_stats}
        restored = self._restore(step, {"variables": variables, "training": training})
        params, batch_stats = restored["variables"]["params"], restored["variables"]["batch_stats"]
        return TrainState(params=params, **restored["training"]), batch_stats

    def restore_variables(self, step: int, like: tuple[Params, BatchStats]) -> tuple[Params, BatchStats]:
        """Returns only what evaluation needs: params and batch_stats."""
        params, batch_stats = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._restore(step, {"variables": {"params": params, "batch_stats": batch_stats}})["variables"]
        return restored["params"], restored["batch_stats"]

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        folder = self.folder / str(step)
        try:
            saved = self._manager.item_metadata(step)
            for name, wanted in items.items():
                _check_leaves(folder, _leaves_of_metadata(saved[name]), _leaves_of(wanted))
            args = {name: ocp.args.StandardRestore(wanted) for name, wanted in items.items()}
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # what Orbax raises for damaged files
            raise CheckpointError(f"the checkpoint {folder} is damaged: {' '.join(str(error).split())[:300]}.") from error


Leaves = dict[str, tuple[tuple[int, ...], str]]


def _leaves_of(tree: Any) -> Leaves:
    def stored(leaf: Any) -> Any:  # Orbax keeps a random key as the integers that it is made of
        return jax.eval_shape(jax.random.key_data, leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(stored, tree))
    return {jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, str(leaf.dtype)) for path, leaf in leaves}


def _leaves_of_metadata(metadata: Any) -> Leaves:
    return {leaf.name: (tuple(leaf.shape), str(leaf.dtype)) for leaf in jax.tree.leaves(metadata.tree)}


def _check_leaves(folder: Path, saved: Leaves, wanted: Leaves) -> None:
    """Raises a `CheckpointError` that names every leaf which one side lacks or has in another shape or dtype."""
    differences = []
    for name in sorted({*saved, *wanted}):
        there, here = ("nothing" if leaf is None else f"{leaf[1]} {list(leaf[0])}" for leaf in (saved.get(name), wanted.get(name)))
        if there != here:
            differences.append(f"{name} ({there} in the checkpoint, {here} in the model)")
    if differences:
        more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise CheckpointError(
            f"the checkpoint {folder} is of another network or optimizer: {'; '.join(differences[:8])}{more}. "
            "Restore it with the config that it was trained with."
        )
