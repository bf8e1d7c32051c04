"""Saves and restores checkpoints, and verifies them with checksums of their files."""

import dataclasses
import json
import logging
import os
import shutil
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from bnjax.errors import UserError, brief
from bnjax.quiet import drop_logs
from bnjax.train_step import TrainState
from bnjax.types import BatchStats, Params, fingerprint, named_leaves

ITEMS = ("variables", "training")
# This record is added to Orbax's files before the checkpoint is renamed to its final name; a
# checkpoint is intact if its files agree with its record.
RECORD = "bnjax.json"


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or does not fit the model."""


def items(
    state: TrainState, batch_stats: BatchStats, evaluated: tuple[Params, BatchStats] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the two items of a checkpoint, "variables" and "training"."""
    training = {"opt_state": state.opt_state, "step": state.step, "rng": state.rng}
    own = {"params": state.params, "batch_stats": batch_stats}
    if evaluated is None:
        return own, training
    return dict(zip(own, evaluated, strict=True)), training | own


def read_records(folder: Path) -> dict[int, dict[str, Any]]:
    """Returns the record of each checkpoint, keyed by step; a damaged one as an empty dict."""
    found = {}
    for path in folder.glob("*"):
        if path.name.isdecimal():
            try:
                found[int(path.name)] = dict(json.loads((path / RECORD).read_bytes()))
            except (OSError, ValueError, TypeError):
                found[int(path.name)] = {}
    return found


def checksums(folder: Path) -> dict[str, list[int]]:
    """Returns the size and CRC-32 of each file that Orbax wrote for the items, keyed by path."""
    found = {}
    for path in sorted(path for item in ITEMS for path in (folder / item).rglob("*")):
        # Orbax adds or removes this file when it gives the folder its final name.
        if path.is_file() and path.name != "commit_success.txt":
            size = checksum = 0
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
            found[path.relative_to(folder).as_posix()] = [size, checksum]
    return found


def leaves_of(items: Any) -> dict[str, str]:
    """Returns the dtype and shape of each leaf as text, keyed by the name of the leaf."""
    return {name: f"{leaf.dtype} {list(leaf.shape)}" for name, leaf in named_leaves(items).items()}


@dataclasses.dataclass
class NewestTwoAndBest(preservation_policy.PreservationPolicy):
    """Keeps the newest two checkpoints and the one with the best accuracy in its record."""

    records: dict[int, dict[str, Any]]

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Returns, for each checkpoint, whether to keep it."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        return [step in (*steps[-2:], best(self.records, steps)) for step in steps]


def best(records: dict[int, dict[str, Any]], steps: list[int]) -> int | None:
    """Returns the step with the highest accuracy; if several steps tie, the earliest of them.

    Returns None if no step was evaluated.
    """
    accuracies = {step: records.get(step, {}).get("accuracy") for step in steps}
    known = {step: accuracy for step, accuracy in accuracies.items() if accuracy is not None}
    return max(known, key=lambda step: (known[step], -step)) if known else None


def keep_best_and_last(folder: Path) -> None:
    """Removes all checkpoints of a finished run except the best and the last.

    The caller must hold the lock on the run's folder.
    """
    records = read_records(folder)
    steps = sorted(records)
    for step in {*steps[:-1]} - {best(records, steps)}:
        shutil.rmtree(folder / str(step))


# Orbax numbers its operations per process, so two threads must not start operations at the same
# time.
_ONE_SAVE = threading.Lock()


class Checkpoints:
    """The checkpoints of one run, in a folder with one subfolder per step.

    Keeps the newest two and the best. Each checkpoint has two items: "variables" (params and
    batch_stats for evaluation) and "training" (opt_state, step and rng; also params and batch_stats
    if evaluation uses different ones). The record of a checkpoint contains the accuracy on the
    validation or test images, the facts in `about`, a fingerprint of the weights, and a checksum of
    every file. Saving happens in the background; leaving the context waits until everything is on
    disk.
    """

    def __init__(self, folder: Path, *, read_only: bool = False):
        """Opens the folder.

        Unless `read_only`, creates the folder and deletes unfinished checkpoints that a killed
        process left in it.
        """
        # Orbax logs its settings as warnings, and also logs the errors that it raises.
        drop_logs("orbax", below=logging.CRITICAL)
        self.folder = folder
        if not read_only and jax.process_index() == 0:
            for draft in folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(draft, ignore_errors=True)
        self._records = read_records(folder)
        self._saving: dict[str, Any] = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=None if read_only else NewestTwoAndBest(self._records),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_record),
            read_only=read_only,
        )
        handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def reload(self) -> None:
        """Reads the folder again after another process has changed it."""
        self._records.clear()
        self._records.update(read_records(self.folder))
        self._manager.reload()

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, in ascending order.

        Waits for a checkpoint that is being saved.
        """
        self.wait()
        return sorted(step for step in self._records if (self.folder / str(step)).is_dir())

    def step(self, which: str) -> int:
        """Returns the step of the checkpoint `which`: "best", "last" or a step number.

        Raises:
            CheckpointError: if there is no such checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                f"there is no checkpoint in {self.folder}. Training saves the first one at its "
                "first evaluation, or when it is stopped."
            )
        if which in ("best", "last"):
            return steps[-1] if which == "last" else best(self._records, steps) or steps[-1]
        if which.isdecimal() and int(which) in steps:
            return int(which)
        raise CheckpointError(
            f"there is no checkpoint {which!r} in {self.folder}. Allowed: best, last, "
            f"{', '.join(map(str, steps))}."
        )

    def about(self, step: int) -> dict[str, Any]:
        """Returns the facts that were saved with a checkpoint, or an empty dict."""
        return self._records[step].get("about", {})

    def newest_intact(self) -> tuple[int | None, list[str]]:
        """Returns the step of the newest intact checkpoint, and messages about damaged ones.

        The step is None if there are no checkpoints. Moves damaged checkpoints of later steps to
        `damaged` next to the folder, because training repeats these steps.

        Raises:
            CheckpointError: if all checkpoints are damaged; in that case none is moved.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                self.verify(step)
            except CheckpointError as error:
                damaged[step] = str(error)
                continue
            for later in damaged:
                target = self.folder.with_name("damaged") / str(later)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                os.replace(self.folder / str(later), target)
                del self._records[later]
            self._manager.reload()
            return step, [
                f"{reason} Resuming from step {step} instead; the damaged one was moved to "
                f"{self.folder.with_name('damaged')}."
                for reason in damaged.values()
            ]
        if damaged:
            raise CheckpointError(
                f"{' '.join(damaged.values())} No other checkpoint is left. Nothing was changed: "
                f"restore {self.folder} from a copy, or train again in another --workdir."
            )
        return None, []

    def verify(self, step: int) -> None:
        """Checks every file of a checkpoint against its checksum.

        Raises:
            CheckpointError: if a file is missing or has changed; names the first such file.
        """
        folder, wanted = self.folder / str(step), self._records[step].get("files", {})
        found = checksums(folder)
        changed = [
            name for name in sorted({*wanted, *found}) if wanted.get(name) != found.get(name)
        ]
        if changed or not wanted:
            name = changed[0] if wanted else RECORD
            raise CheckpointError(
                f"the checkpoint {folder} is damaged: its file {name} is missing or has changed."
            )

    def save(
        self,
        state: TrainState,
        batch_stats: BatchStats,
        accuracy: float | None,
        about: dict[str, Any],
        evaluated: tuple[Params, BatchStats] | None = None,
    ) -> None:
        """Saves a checkpoint of the state's step in the background.

        Args:
            accuracy: the accuracy on the validation or test images, which determines the best
                checkpoint; None if the step was not evaluated.
            about: facts to save with the checkpoint, as JSON values: config, versions, conventions.
            evaluated: the weights and statistics for evaluation, if they differ from those used in
                training.

        Raises:
            CheckpointError: if this checkpoint or the previous one cannot be written, for instance
                because the disk is full.
        """
        step = int(state.step)
        if step in self.steps():
            return
        variables, training = items(state, batch_stats, evaluated)
        about = about | {"weights": fingerprint(variables["params"])}
        args = ocp.args.Composite(
            variables=ocp.args.StandardSave(variables), training=ocp.args.StandardSave(training)
        )
        try:
            leaves = leaves_of({"variables": variables, "training": training})
            self._saving = {"step": step, "accuracy": accuracy, "about": about, "leaves": leaves}
            self._records[step] = self._saving
            with _ONE_SAVE:
                self._manager.save(step, args=args)
        except Exception as error:  # Orbax, TensorStore and file systems raise many types
            raise self._unsaved(error) from error

    def restore(
        self, step: int, like: tuple[TrainState, BatchStats]
    ) -> tuple[TrainState, BatchStats]:
        """Restores the state and statistics of a step, and places them on the default device.

        `like` gives the tree structure, shapes and dtypes.
        """
        state, batch_stats = like
        saved = self._records[step].get("leaves", {})
        apart = any(name.startswith("training.params.") for name in saved)
        evaluated = (state.params, batch_stats) if apart else None
        variables, training = items(state, batch_stats, evaluated)
        restored = self._restore(step, {"variables": variables, "training": training})
        # Entries in "training" take precedence.
        found = restored["variables"] | restored["training"]
        batch_stats = found.pop("batch_stats")
        return TrainState(**found), batch_stats

    def restore_variables(
        self, step: int, like: tuple[Params, BatchStats]
    ) -> tuple[Params, BatchStats]:
        """Restores only the params and batch_stats for evaluation."""
        params, batch_stats = like
        restored = self._restore(
            step, {"variables": {"params": params, "batch_stats": batch_stats}}
        )["variables"]
        return restored["params"], restored["batch_stats"]

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        try:
            self.verify(step)  # needed because TensorStore does not detect changed bytes
        except CheckpointError as error:
            others = [str(one) for one in sorted(self._records) if one != step]
            hint = f" Other checkpoints: --checkpoint {' or '.join(others)}." if others else ""
            raise CheckpointError(f"{error}{hint}") from error
        folder, saved = self.folder / str(step), self._records[step]["leaves"]
        wanted = leaves_of(items)
        there = {name: leaf for name, leaf in saved.items() if name.partition(".")[0] in items}
        if differences := [
            f"{name} ({there.get(name, 'nothing')} in the checkpoint, "
            f"{wanted.get(name, 'nothing')} in the model)"
            for name in sorted({*there, *wanted})
            if there.get(name) != wanted.get(name)
        ]:
            more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
            raise CheckpointError(
                f"the checkpoint {folder} belongs to another network or optimizer: "
                f"{'; '.join(differences[:8])}{more}. Restore it with the config that was "
                "used to train it."
            )
        (default,) = jax.numpy.zeros(()).devices()
        # The restored arrays do not depend on the devices that saved the checkpoint.
        here = jax.sharding.SingleDeviceSharding(default)
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), items
        )
        args = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        return self._manager.restore(step, args=ocp.args.Composite(**args))

    def wait(self) -> None:
        """Waits until all saved checkpoints are on disk.

        Raises:
            CheckpointError: if a checkpoint could not be written.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # raised in the background thread
            raise self._unsaved(error) from error

    def _write_record(self) -> None:
        if jax.process_index() > 0:
            return
        # Orbax's temporary folder for this step.
        (folder,) = self.folder.glob(f"{self._saving['step']}.*")
        self._saving["files"] = checksums(folder)
        (folder / RECORD).write_text(json.dumps(self._saving))

    def _unsaved(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"a checkpoint could not be saved in {self.folder}: {brief(error)}. Earlier "
            "checkpoints are intact: free some space or make the folder writable, and the same "
            "command resumes training from the last one."
        )
