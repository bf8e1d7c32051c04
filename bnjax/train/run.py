"""One run while it is being trained: where it stands, what it has been through, and what it leaves in its folder."""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bnjax.arrays import BatchStats
from bnjax.data.batches import Rows, take, train_rows
from bnjax.data.datasets import Dataset
from bnjax.errors import NonFiniteError, UserError
from bnjax.metrics import Metrics
from bnjax.train import rundir
from bnjax.train.build import Experiment
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.diagnose import first_nonfinite
from bnjax.train.program import Program
from bnjax.train.rundir import DataFacts
from bnjax.train.summary import summarise, versions
from bnjax.train.writers import (
    RunWriter,
    first_at_or_below,
    read_lines,
    read_metrics,
    write_json,
)
from bnjax.train_step import TrainState


class Run:
    """One run while it is being trained.

    Attributes:
        name, seed: of its config.
        start: the last step of its newest intact checkpoint; 0 if there is none.
        notes: what was wrong with later ones.
        ended: whether it takes no more steps: all are taken, the loss to stop at was reached, or it broke down.
        failure: why it broke down, or None.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        experiment: Experiment,
        dataset: Dataset,
        stack: contextlib.ExitStack,
    ):
        """Takes the folder and opens what is in it, until `stack` closes.

        Raises:
            UserError: if the folder belongs to another config or process, all its checkpoints are damaged, or its files lack steps.
        """
        stack.enter_context(rundir.locked(workdir))
        rundir.claim(workdir, config, DataFacts.of(dataset))
        self.name, self.seed, self._config, self._workdir = (
            config.name,
            config.seed,
            config,
            workdir,
        )
        self._experiment, self._dataset = experiment, dataset
        self._about = {
            "config": config.to_dict(),
            "versions": versions(),
            "norm": rundir.norm_conventions(config),
        }
        self._init_key, self._order_key = jax.random.split(jax.random.key(config.seed))
        self._checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints"))
        newest, self.notes = self._checkpoints.newest_intact()
        self.start, self._is_new = newest or 0, newest is None
        self._writer = stack.enter_context(RunWriter(workdir, start=self.start))
        self._seconds, self._skipped_in_a_row = (
            _so_far(workdir, self.start) if self.start else (0.0, 0)
        )
        self.ended = self.start == experiment.steps or self._has_reached_its_loss()
        self.failure: NonFiniteError | None = None

    def _has_reached_its_loss(self) -> bool:
        target = self._experiment.stop_at_loss
        return (
            target is not None
            and first_at_or_below(read_metrics(self._workdir / "metrics.jsonl"), target) is not None
        )

    def begin(self, program: Program) -> tuple[TrainState, BatchStats]:
        """Returns the state and the statistics to go on with."""
        like = program.like()
        return (
            program.init(self._init_key)
            if self._is_new
            else self._checkpoints.restore(self.start, like)
        )

    def show(self, program: Program) -> None:
        """Shows what is trained, once in a run."""
        if self._is_new:
            program.watch.begin(self._writer, self._config)

    def order(self) -> Iterator[Rows]:
        """Yields the rows of the batches to come."""
        key = self._order_key if self._experiment.shuffle else None
        return train_rows(
            len(self._dataset.train.label), self._experiment.batch_size, key=key, start=self.start
        )

    def record(self, step: int, metrics: Metrics, seconds: float) -> None:
        """Records a training step, and the seconds that it took."""
        means, skipped = metrics.means(), bool(metrics.skipped)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        self._seconds += seconds
        self._writer.train(step, means, skipped=skipped)
        self._writer.timing(step, self._seconds, self._experiment.batch_size / seconds)

    def is_lost(self) -> bool:
        """Returns whether more steps in a row were not finite than the config puts up with."""
        return self._skipped_in_a_row > self._experiment.most_skipped

    def fail(self, step: int, state: TrainState, batch_stats: BatchStats, rows: Rows) -> None:
        """Ends the run at a step that was not finite; the state may be one of a later step, if that changed nothing either."""
        self._writer.flush()
        before = dataclasses.replace(state, step=jax.numpy.int32(step - 1))
        found = first_nonfinite(
            before, batch_stats, take(self._dataset.train, rows), model=self._experiment.model
        )
        self.ended, self.failure = (
            True,
            _nonfinite(step, self._skipped_in_a_row, found, self._checkpoints.steps()),
        )

    def test(
        self,
        step: int,
        tested: Metrics,
        state: TrainState,
        batch_stats: BatchStats,
        program: Program,
    ) -> dict[str, float]:
        """Records an evaluation, looks at the network, and returns the loss and the accuracy."""
        means = tested.means()
        self._writer.test(step, means, count=int(tested.count))
        program.watch.look(self._writer, step, state, batch_stats)
        return means

    def save(self, state: TrainState, batch_stats: BatchStats, accuracy: float | None) -> None:
        """Saves a checkpoint; `accuracy` of an evaluation at this step, or None."""
        self._writer.flush()  # first, so that a checkpoint never knows more than the files
        self._checkpoints.save(state, batch_stats, accuracy, self._about)

    def finish(self) -> dict[str, Any]:
        """Writes and returns the summary, once everything else is on disk."""
        self._writer.board.finished()
        self._writer.flush()
        self._checkpoints.wait()
        summary = summarise(
            self._config, self._workdir, self._dataset, self._experiment, self._seconds
        )
        write_json(self._workdir / "summary.json", summary)
        return summary


def _so_far(workdir: Path, step: int) -> tuple[float, int]:
    """Returns the seconds that training took up to a step, and how many steps in a row were skipped before it.

    Raises:
        UserError: if metrics.jsonl or timing.jsonl does not reach so far.
    """
    train = [line for line in read_metrics(workdir / "metrics.jsonl") if line["split"] == "train"]
    timing = read_lines(workdir / "timing.jsonl")
    for name, lines in (("metrics.jsonl", train), ("timing.jsonl", timing)):
        if not lines or lines[-1]["step"] != step:
            raise UserError(
                f"{workdir / name} ends before step {step}, of which there is a checkpoint. Restore the file from a copy, or train anew in "
                "another folder with --workdir."
            )
    seconds = timing[-1].get("seconds")
    return seconds if isinstance(seconds, float) else 0.0, sum(
        1 for _ in itertools.takewhile(lambda line: "skipped" in line, train[::-1])
    )


def _nonfinite(step: int, in_a_row: int, found: str | None, saved: list[int]) -> NonFiniteError:
    where = (
        f"The first thing that is not finite there is {found}."
        if found
        else "The parameters have moved on since, and it cannot be found any more."
    )
    rows = f" and {in_a_row - 1} before it" if in_a_row > 1 else ""
    kept = f"The checkpoint of step {saved[-1]} is kept" if saved else "Nothing was saved yet"
    return NonFiniteError(
        f"step {step}{rows} gave a loss, a gradient or a statistic that is not finite. {where} {kept}. What usually helps: a lower "
        "learning rate (--config.optimizer.learning_rate=…), a larger config.model.epsilon, float32 instead of bfloat16, and a look at the "
        "images; --config.train.on_nonfinite=skip drops such steps instead. Each is another config, and needs a --workdir of its own."
    )
