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
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_names=("variables", "training"))

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
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except (ValueError, KeyError, TypeError, OSError) as error:
            reason = " ".join(str(error).split())[:400]
            raise CheckpointError(
                f"the checkpoint {self.folder / str(step)} cannot be read for this model: {reason}. Either it is damaged "
                "(choose another with --checkpoint), or the config has changed since it was saved."
            ) from error
