"""What one run leaves in its folder while it is trained, and where it stands."""

import contextlib
import dataclasses
import itertools
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.errors import NonFiniteError, UserError
from bnjax.metrics import Metrics
from bnjax.train import rundir
from bnjax.train.build import Experiment
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.diagnostics import Observer, first_nonfinite
from bnjax.train.records import (
    RunWriter,
    first_at_or_below,
    read_lines,
    read_metrics,
    write_json,
)
from bnjax.train.steps import State, Steps, Variables, training_batch
from bnjax.train.summary import summarise, versions
from bnjax.train_step import TrainState
from bnjax.types import Batch, BatchStats


class Recorder:
    """Records a run in its folder: training steps, evaluations, checkpoints, and the summary.

    Attributes:
        name, seed: of the config.
        data: the training images, in words.
        start: the last step of the newest intact checkpoint; 0 if there is none.
        notes: what was wrong with later ones.
        skipped: how many steps in a row before the next one were dropped as not finite.
        ended: whether it takes no more steps: all are taken, the loss to stop at was reached, or
            it broke down.
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
        """Opens what is in the folder, which has been taken, until `stack` closes.

        Raises:
            UserError: if all its checkpoints are damaged, or its files lack steps.
        """
        self.name, self.seed = config.name, config.seed
        self.data = f"{len(dataset.train):,} images of {dataset.label}"
        self._config, self._workdir = config, workdir
        self._experiment, self._dataset = experiment, dataset
        self._about = {
            "config": config.to_dict(),
            "versions": versions(),
            "norm": rundir.norm_conventions(config),
        }
        self._checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints"))
        newest, self.notes = self._checkpoints.newest_intact()
        self.start, self._is_new = newest or 0, newest is None
        self._writer = stack.enter_context(RunWriter(workdir, start=self.start))
        self._seconds, self.skipped = _so_far(workdir, self.start) if self.start else (0.0, 0)
        self.ended = self.start == experiment.steps or self._has_reached_its_loss()
        self.failure: NonFiniteError | None = None

    def _has_reached_its_loss(self) -> bool:
        target, lines = self._experiment.stop_at_loss, self._workdir / "metrics.jsonl"
        return target is not None and first_at_or_below(read_metrics(lines), target) is not None

    def begin(self, steps: Steps) -> State:
        """Returns the state and the statistics to go on with."""
        like = steps.like()
        if self._is_new:
            init_key, _ = jax.random.split(jax.random.key(self.seed))
            return steps.init(init_key)
        return self._checkpoints.restore(self.start, like, apart=self._experiment.is_apart)

    def introduce(self, observer: Observer) -> None:
        """Shows what is trained, once in a run."""
        if self._is_new:
            observer.introduce(self._writer, self._config)

    def record(self, step: int, metrics: Metrics, seconds: float) -> None:
        """Records a training step, and the seconds that it took."""
        skipped = bool(metrics.skipped)
        self.skipped = self.skipped + 1 if skipped else 0
        self._seconds += seconds
        self._writer.train(step, metrics.means(), skipped=skipped)
        self._writer.timing(step, self._seconds, self._experiment.batch_size / seconds)

    def is_lost(self) -> bool:
        """Returns whether more steps in a row were not finite than the config puts up with."""
        return self.skipped > self._experiment.most_skipped

    def fail(self, step: int, state: TrainState, batch_stats: BatchStats, batch: Batch) -> None:
        """Ends the run at a step that was not finite.

        Everything but `state.step` is as before it.
        """
        self._writer.flush()
        before = dataclasses.replace(state, step=jnp.int32(step - 1))
        experiment = self._experiment
        found = first_nonfinite(
            before,
            batch_stats,
            training_batch(experiment, before, batch),
            model=experiment.model,
            loss_fn=experiment.loss_fn,
        )
        self.ended = True
        self.failure = _nonfinite(step, self.skipped, found, self._checkpoints.steps())

    def test(
        self, step: int, metrics: Metrics, state: State, evaluated: Variables, observer: Observer
    ) -> dict[str, float]:
        """Records an evaluation, observes the network, and returns the loss and the accuracy."""
        means = metrics.means()
        self._writer.test(step, means, count=int(metrics.count))
        observer.observe(self._writer, step, *state, evaluated)
        return means

    def save(self, state: State, evaluated: Variables, accuracy: float | None) -> None:
        """Saves a checkpoint; `accuracy` of an evaluation at this step, or None."""
        self._writer.flush()  # first, so that a checkpoint never knows more than the files
        apart = evaluated if self._experiment.is_apart else None
        self._checkpoints.save(*state, accuracy, self._about, evaluated=apart)

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


class Follower:
    """Takes part in a run that another process records; everything is as for `Recorder`."""

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        config: ConfigDict,
        workdir: Path,
        experiment: Experiment,
        stack: contextlib.ExitStack,
    ):
        """Opens the checkpoints; where the run stands has to be said by the first process."""
        self.name, self.seed, self.data = config.name, config.seed, ""
        self._experiment = experiment
        self._checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints"))
        self.start, self.skipped, self.ended = 0, 0, False
        self.failure: NonFiniteError | None = None

    def begin(self, steps: Steps) -> State:
        """Returns the state and the statistics to go on with."""
        like = steps.like()
        if self.start not in self._checkpoints.steps():  # weights from elsewhere may be of step 0
            init_key, _ = jax.random.split(jax.random.key(self.seed))
            return steps.init(init_key)
        self._checkpoints.reload()
        return self._checkpoints.restore(self.start, like, apart=self._experiment.is_apart)

    def introduce(self, observer: Observer) -> None:
        """Shows nothing."""

    def record(self, step: int, metrics: Metrics, seconds: float) -> None:
        """Counts the steps in a row that were not finite."""
        self.skipped = self.skipped + 1 if metrics.skipped else 0

    def is_lost(self) -> bool:
        """Returns whether more steps in a row were not finite than the config puts up with."""
        return self.skipped > self._experiment.most_skipped

    def fail(self, step: int, state: TrainState, batch_stats: BatchStats, batch: Batch) -> None:
        """Ends the run at a step that was not finite."""
        self.ended, self.failure = True, _nonfinite(step, self.skipped, None, [])

    def test(
        self, step: int, metrics: Metrics, state: State, evaluated: Variables, observer: Observer
    ) -> dict[str, float]:
        """Returns the loss and the accuracy."""
        return metrics.means()

    def save(self, state: State, evaluated: Variables, accuracy: float | None) -> None:
        """Saves this process's part of a checkpoint."""
        apart = evaluated if self._experiment.is_apart else None
        self._checkpoints.save(*state, accuracy, {}, evaluated=apart)

    def finish(self) -> dict[str, Any]:
        """Returns no summary: the first process writes it."""
        self._checkpoints.wait()
        return {}


def _so_far(workdir: Path, step: int) -> tuple[float, int]:
    """Returns the seconds of training up to a step, and the steps in a row skipped before it.

    Raises:
        UserError: if metrics.jsonl or timing.jsonl does not reach so far.
    """
    train = [line for line in read_metrics(workdir / "metrics.jsonl") if line["split"] == "train"]
    timing = read_lines(workdir / "timing.jsonl")
    for name, lines in (("metrics.jsonl", train), ("timing.jsonl", timing)):
        if not lines or lines[-1]["step"] != step:
            raise UserError(
                f"{workdir / name} ends before step {step}, of which there is a checkpoint. "
                "Restore the file from a copy, or train anew in another folder with --workdir. "
                "What `bnjax port` made of weights that had been trained has no such file: it can "
                "be evaluated, and not trained on."
            )
    seconds = timing[-1].get("seconds")
    skipped = itertools.takewhile(lambda line: "skipped" in line, train[::-1])
    return seconds if isinstance(seconds, float) else 0.0, len([*skipped])


def _nonfinite(step: int, in_a_row: int, found: str | None, saved: list[int]) -> NonFiniteError:
    where = (
        f"The first thing that is not finite there is {found}."
        if found
        else "Computed again, layer by layer, everything is finite."
    )
    rows = f" and {in_a_row - 1} before it" if in_a_row > 1 else ""
    kept = f"The checkpoint of step {saved[-1]} is kept" if saved else "Nothing was saved yet"
    return NonFiniteError(
        f"step {step}{rows} gave a loss, a gradient or a statistic that is not finite. {where} "
        f"{kept}. What usually helps: a lower learning rate "
        "(--config.optimizer.learning_rate=…), a larger config.model.epsilon, float32 instead of "
        "bfloat16, and a look at the images; "
        "--config.train.on_nonfinite=skip drops such steps instead. Each is another config, and "
        "needs a --workdir of its own."
    )


class Progress:
    """A bar with the time to go on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, done: int):
        """Starts at `done` of `total` steps."""
        self._bar = tqdm.tqdm(
            total=total,
            initial=done,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def advance(self, loss: float, accuracy: float, images_per_s: float) -> None:
        """Counts one training step."""
        words = f"loss {loss:.3f}, accuracy {accuracy:.3f}, {images_per_s:,.0f} images/s"
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.tqdm.write(text)  # above other bars, too
        sys.stdout.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signal`.

    A second one ends the program at once.

    An exception in the middle of a step would find its inputs donated and its outputs not there
    yet. In another thread than the main one, where Python allows no handlers, nothing changes.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        """Has received nothing yet."""
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
