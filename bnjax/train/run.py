"""Records the training of one or several seeds in files, checkpoints and a progress bar."""

import contextlib
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tqdm
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.data.feed import Item
from bnjax.errors import NonFiniteError, UserError
from bnjax.metrics import Metrics
from bnjax.nonfinite import explained, too_many
from bnjax.train import cpu, rundir
from bnjax.train.build import Experiment
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.devices import from_first
from bnjax.train.diagnostics import Observer, first_nonfinite
from bnjax.train.jsonl import OnMetrics, RunWriter, first_at_or_below, read_lines, write_json
from bnjax.train.steps import State, Steps, Variables, training_batch, unstack
from bnjax.train.summary import summarise, versions


class Run:
    """The seeds of one config that train in one program.

    With several seeds, all arrays have a leading axis for the seeds.

    Attributes:
        seeds: the seeds, all at the same step, `start`.
        step_seconds: the duration of a step in the latest dispatch, in seconds; infinite at first.
    """

    def __init__(self, seeds: Sequence["Seed"], steps: Steps, observer: Observer):
        """Shows a progress bar in the terminal until `close` is called."""
        self.seeds, self.start = seeds, seeds[0].start
        self._steps, self._experiment, self._observer = steps, steps.experiment, observer
        self.step_seconds = float("inf")
        self._bar = tqdm.tqdm(
            total=steps.experiment.steps,
            initial=self.start,
            unit="step",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        self.close = self._bar.close

    @property
    def ended(self) -> bool:
        """Whether all seeds have ended."""
        return all(seed.ended for seed in self.seeds)

    @property
    def is_finishing(self) -> bool:
        """Whether a seed has just taken its last step."""
        return any(seed.is_finishing and not seed.ended for seed in self.seeds)

    def begin(self) -> tuple[Any, Any, Any]:
        """Initialises or restores the state, statistics and count of bad steps of all seeds."""
        states = [seed.restore(self._steps) for seed in self.seeds]
        _say(self._banner(states[0][0].params))
        for seed in self.seeds:
            if seed.writer and seed.is_new:
                self._observer.introduce(seed.writer, seed.config)
        begun = self._steps.join(states, [seed.bad_steps for seed in self.seeds])
        self._compiled = self._steps.compile_seconds
        self._trimmed_at = self._saved_at = self._since = time.perf_counter()
        return begun

    def log(
        self, both: State, first: int, dispatch: list[tuple[Item, ...]], metrics: Metrics
    ) -> None:
        """Waits for the device, and writes the metrics of the steps from `first` on.

        A seed with too many consecutive bad steps fails. Its state in `both` is the state before
        the first bad step, because the device drops all later steps.
        """
        experiment = self._experiment
        each = unstack(metrics, len(dispatch), len(self.seeds))
        now, compiling = time.perf_counter(), self._steps.compile_seconds - self._compiled
        seconds = self.step_seconds = max(now - self._since - compiling, 1e-6) / len(dispatch)
        self._since, self._compiled = now, self._compiled + compiling
        if compiling > 1:
            _say(f"compiled in {compiling:.0f} s, not included in the training time")
        if now - self._trimmed_at > 1:
            cpu.give_back_freed_memory()
            self._trimmed_at = now
        for step, (of_seeds, items) in enumerate(zip(each, dispatch, strict=True), first):
            active = self._active()
            rate = experiment.batch_size * len(active) / seconds
            for i, seed in active:
                loss, target = of_seeds[i].means()["loss"], experiment.stop_at_loss
                seed.bad_steps = (seed.bad_steps + 1) * int(of_seeds[i].skipped)
                seed.is_finishing = step == experiment.steps or (
                    target is not None and loss <= target
                )
                seed.seconds += seconds / len(active)
                if seed.writer:
                    seed.writer.step(step, of_seeds[i], seed.seconds, rate)
                if too_many(seed.bad_steps, experiment.most_skipped):
                    self._fail(seed, step, self._steps.local(both, i), items[i])
            if active:
                total = functools.reduce(Metrics.merge, (of_seeds[i] for i, _ in active)).means()
                self._bar.set_postfix_str(
                    f"loss {total['loss']:.3f}, accuracy {total['accuracy']:.3f}, "
                    f"{rate:,.0f} images/s",
                    refresh=False,
                )
                self._bar.update()

    def _fail(self, seed: "Seed", step: int, before: State, item: Item) -> None:
        """Ends a seed at a bad step; `before` is the previous state, except for `state.step`."""
        if seed.writer:
            seed.writer.flush()
        experiment, feed, (state, batch_stats) = self._experiment, self._steps.feed, before
        state = dataclasses.replace(state, step=jnp.int32(step - 1))
        batch = training_batch(experiment, state, feed.batch(feed.resident, item))
        saved = seed.checkpoints.steps()
        seed.failure = explained(
            step,
            seed.bad_steps,
            saved[-1] if saved else None,
            first_nonfinite(
                state, batch_stats, batch, model=experiment.model, loss_fn=experiment.loss_fn
            ),
        )
        seed.ended, self._since = True, time.perf_counter()

    def is_overdue(self) -> bool:
        """Returns whether the time since the last save exceeds the interval in the config."""
        minutes = self._experiment.save_every_minutes
        return minutes is not None and time.perf_counter() - self._saved_at > 60 * minutes

    def test(self, step: int, both: State, evaluated: Variables, *, everyone: bool) -> None:
        """Evaluates and observes every seed, or only seeds that have taken their last step."""
        chosen_by, images = self.seeds[0].dataset.chosen_by
        metrics = self._steps.test(*evaluated, images)
        for i, seed in self._active(everyone):
            seed.accuracy = self._record(seed, step, chosen_by, metrics[i])
            seed.judge(int(metrics[i].correct))
            seed.is_finishing |= seed.has_waited
            if seed.writer:
                own, shown = self._steps.local(both, i), self._steps.local(evaluated, i)
                self._observer.observe(seed.writer, step, *own, shown)
        if chosen_by != "test" and (last := self._active(everyone=False)):
            metrics = self._steps.test(*evaluated)
            for i, seed in last:
                self._record(seed, step, "test", metrics[i])

    def _record(self, seed: "Seed", step: int, split: str, metrics: Metrics) -> float:
        """Writes and prints the metrics of an evaluation, and returns the accuracy."""
        means = metrics.means()
        if seed.writer:
            seed.writer.evaluation(step, split, metrics)
        which = f"seed {seed.number}, " if len(self.seeds) > 1 else ""
        _say(
            f"{which}step {step}: {split} loss {means['loss']:.4f}, "
            f"{split} accuracy {means['accuracy']:.4f}"
        )
        return means["accuracy"]

    def save(self, both: State, evaluated: Variables, *, everyone: bool) -> None:
        """Writes a checkpoint for every active seed, or only for those that have just finished.

        After the save, a seed that has taken its last step has ended.
        """
        for i, seed in self._active(everyone):
            if seed.writer:
                seed.writer.flush()  # first, so that the files include the checkpoint's step
            about = {"config": seed.config.to_dict(), "versions": versions()}
            own, shown = self._steps.of_seed(both, i), self._steps.of_seed(evaluated, i)
            if seed.is_finishing and any(self._experiment.frozen):
                seed.moved = self._moved(seed, own)
            apart = shown if self._experiment.is_apart else None
            seed.checkpoints.save(*own, seed.accuracy, about, evaluated=apart)
            seed.accuracy, seed.ended = None, seed.is_finishing
        self._since = time.perf_counter()  # evaluating and saving are not training time
        if everyone:
            self._saved_at = self._since

    def _moved(self, seed: "Seed", both: State) -> list[str] | None:
        """Compares the frozen leaves with those at the start of the run, and prints the result."""
        try:
            (state, batch_stats), _ = self._steps.begin(seed.number)
        except UserError as error:
            _say(f"\nWARNING: the frozen leaves could not be checked: {error}\n")
            return None
        frozen, before = self._experiment.frozen, (state.params, batch_stats)
        moved = frozen.moved(*jax.device_get((before, (both[0].params, both[1]))))
        what = f"{len(frozen.params)} parameters and the statistics of {len(frozen.norms)} norms"
        _say(
            f"\nWARNING: frozen leaves have changed: {', '.join(moved)}\n"
            if moved
            else f"frozen: {what} are bit-identical to the start"
        )
        return moved

    def _active(self, everyone: bool = True) -> list[tuple[int, "Seed"]]:
        return [
            (i, seed)
            for i, seed in enumerate(self.seeds)
            if not seed.ended and (everyone or seed.is_finishing)
        ]

    def _banner(self, params: Any) -> str:
        experiment, many = self._experiment, len(self.seeds) > 1
        config, data = self.seeds[0].config, self.seeds[0].dataset
        devices = experiment.parallel.mesh.devices.flat
        return (
            f"{config.name}{f', {len(self.seeds)} seeds in one program' * many}: "
            f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, "
            f"{len(data.train):,} images of {data.label}, "
            f"steps {self.start + 1} to {experiment.steps} of {experiment.batch_size} images, on "
            f"{f'{len(devices)} x ' * (len(devices) > 1)}{devices[0].device_kind}"
        )


class Seed:
    """One seed of a run, with the seed's open folder and progress.

    Attributes:
        number: the value of the seed.
        config, dataset: the config (with this seed) and the data set of the run.
        start: the last step of the newest intact checkpoint; 0 if there is none.
        is_new: whether the seed has no checkpoint yet.
        bad_steps: the number of consecutive non-finite steps that were dropped, up to the latest
            step.
        seconds: the training time so far, in seconds.
        accuracy: the accuracy after the latest step, if it was evaluated.
        best: the largest number of correct predictions in an evaluation; -1 before the first
            evaluation.
        waited: the number of evaluations since the best evaluation.
        is_finishing: whether the latest step was the last step of the seed.
        ended: whether training of the seed has ended.
        failure: the error that ended training, or None.
        moved: the names of frozen leaves that have changed; None if nothing was compared.
        checkpoints: the checkpoints; each process saves a part.
        writer: the writer of all other files in the first process; None in the others.
    """

    def __init__(
        self,
        config: ConfigDict,
        number: int,
        folder: Path,
        experiment: Experiment,
        dataset: Dataset,
        on_metrics: OnMetrics | None,
        stack: contextlib.ExitStack,
    ):
        """Locks and opens the folder in all processes, until `stack` closes.

        Raises:
            UserError: if the folder belongs to a different config or process, all checkpoints are
                damaged, or its files lack steps.
        """
        self.config, self.number = config.copy_and_resolve_references(), number
        self.config.seed, self.dataset = number, dataset
        self._folder, self._experiment = folder, experiment
        self.seconds, self.is_finishing = 0.0, False
        self.accuracy: float | None = None
        self.failure: NonFiniteError | None = None
        self.moved: list[str] | None = None
        self.writer: RunWriter | None = None
        self._take(stack)
        self.checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
        newest, bad_steps, ended, self.best, self.waited = None, 0, False, -1, 0
        if jax.process_index() == 0:
            newest, damaged = self.checkpoints.newest_intact()
            for note in damaged:
                print(f"\nWARNING: {note}\n", flush=True)
            start, target = newest or 0, experiment.stop_at_loss
            self.writer = stack.enter_context(RunWriter(folder, start=start, on_metrics=on_metrics))
            lines = read_lines(folder / "metrics.jsonl")
            if start:
                self.seconds, bad_steps = _so_far(folder, start, lines)
            for line in lines:
                if line["split"] == dataset.chosen_by[0]:
                    self.judge(round(line["accuracy"] * line["count"]))
            ended = (
                start == experiment.steps
                or self.has_waited
                or (target is not None and first_at_or_below(lines, target) is not None)
            )
        self.start, self.bad_steps, self.best, self.waited, *flags = from_first(
            newest or 0, bad_steps, self.best, self.waited, newest is None, ended
        )
        self.is_new, self.ended = map(bool, flags)

    def _take(self, stack: contextlib.ExitStack) -> None:
        refused: UserError | OSError | None = None
        if jax.process_index() == 0:
            try:
                stack.enter_context(rundir.locked(self._folder))
                rundir.take(self._folder, self.config, rundir.DataFacts.of(self.dataset))
            except (UserError, OSError) as error:  # raised below, once all processes are informed
                refused = error
        (failed,) = from_first(refused is not None)
        if failed:
            raise refused or UserError("the first process could not start; see its error message.")

    def judge(self, correct: int) -> None:
        """Counts the evaluations since the best one, given a number of correct predictions."""
        self.waited = 0 if correct > self.best else self.waited + 1
        self.best = max(correct, self.best)

    @property
    def has_waited(self) -> bool:
        """Whether too many evaluations have passed since the best one."""
        return 0 < self._experiment.patience <= self.waited

    def restore(self, steps: Steps) -> State:
        """Restores the state and statistics from the newest checkpoint, or initialises them."""
        like = steps.like()
        if self.is_new:
            state, taken = steps.begin(self.number)
            if taken and self.writer:
                _say(f"seed {self.number} starts from {self._experiment.source}:\n{taken}")
                write_json(self._folder / "start.json", taken._asdict())
            return state
        self.checkpoints.reload()  # the first process may have moved damaged checkpoints
        return self.checkpoints.restore(self.start, like)

    def finish(self) -> dict[str, Any]:
        """Writes the summary after all other files, and returns it."""
        self.checkpoints.wait()
        if self.writer is None:
            return {}
        self.writer.board.finished()
        self.writer.flush()
        summary = summarise(self.config, self._folder, self.dataset, self._experiment, self.seconds)
        if self.moved is not None:
            summary["frozen_leaves_that_moved"] = self.moved
        write_json(self._folder / "summary.json", summary)
        return summary


def _so_far(workdir: Path, step: int, metrics: list[dict[str, Any]]) -> tuple[float, int]:
    """Returns the training time up to a step, and the length of the run of bad steps up to it.

    Raises:
        UserError: if metrics.jsonl or timing.jsonl ends before the step.
    """
    train = [line for line in metrics if line["split"] == "train"]
    timing = read_lines(workdir / "timing.jsonl")
    for name, lines in (("metrics.jsonl", train), ("timing.jsonl", timing)):
        if not lines or lines[-1]["step"] != step:
            raise UserError(
                f"{workdir / name} ends before step {step}, which has a checkpoint. Restore the "
                "file from a copy, or train again in another folder with --workdir. A folder made "
                "by `bnjax precise` has no such file: to continue training its network, give this "
                "folder with --from and another --workdir."
            )
    skipped = itertools.takewhile(lambda line: "skipped" in line, train[::-1])
    return float(timing[-1]["seconds"]), len([*skipped])


def _say(text: str) -> None:
    tqdm.tqdm.write(text)  # prints above the progress bars
    sys.stdout.flush()
