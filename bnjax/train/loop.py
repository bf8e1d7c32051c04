"""Training with everything around it: `train_and_evaluate(config, workdir, dataset)`."""

import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.data.feed import Feed, Item
from bnjax.errors import NonFiniteError, UserError
from bnjax.metrics import Metrics
from bnjax.train import build, cpu, devices, rundir
from bnjax.train.build import Experiment
from bnjax.train.clock import Clock
from bnjax.train.devices import Agreement
from bnjax.train.diagnostics import Observer
from bnjax.train.run import Follower, Progress, Recorder, StopRequest
from bnjax.train.steps import Steps, default_feed, unstack

# What the device is given at once: long beside the host's own work, short beside a user's Ctrl-C.
DISPATCH_SECONDS = 0.5

Summary = dict[str, Any]


class Stopped(Exception):
    """Ctrl-C or SIGTERM came; everything up to `step` is saved (None: between two runs)."""

    def __init__(self, step: int | None, received: signal.Signals):
        """Keeps the last complete step and the signal."""
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {received.name}{after}")
        self.step, self.signal = step, received


def train_and_evaluate(config: ConfigDict, workdir: Path, dataset: Dataset) -> Summary:
    """Trains and evaluates, fills the run's folder and returns its summary.

    Resumes where it was stopped.

    Args:
        config: as `bnjax.train.config.default_config` lays it out.
        workdir: the run's folder, created if need be.
        dataset: from `bnjax.data.datasets.load`.

    Raises:
        UserError: if the config is impossible, the folder belongs to another run or process, or
            the disk fails.
        NonFiniteError: if more steps in a row than the config allows are not finite.
        Stopped: after Ctrl-C or SIGTERM, when the last complete step has been saved.
    """
    with StopRequest() as stop:
        (result,) = Trainer(config, dataset).train({config.seed: workdir}, stop).values()
    if isinstance(result, NonFiniteError):
        raise result
    return result


class Trainer:
    """Trains the runs of one config, whatever their seeds.

    What is compiled for one is used for the next.
    """

    def __init__(self, config: ConfigDict, dataset: Dataset, feed: Feed | None = None):
        """Compiles nothing yet.

        Raises:
            ConfigError: if the config is impossible.
        """
        self._config, self._dataset = config, dataset
        self._experiment = build.experiment(config, dataset)
        self._feed = feed or default_feed(self._experiment, dataset.train)
        self._observer = Observer(self._experiment, dataset)
        self._steps: dict[int, Steps] = {}

    def train(
        self, folders: Mapping[int, Path], stop: StopRequest
    ) -> dict[int, Summary | NonFiniteError]:
        """Takes the steps that are missing in each seed's folder, all in one program.

        Returns what each came to. Runs that stand at different steps, after an interruption, are
        taken one group after the other; in groups of another size the results are the same but for
        rounding. The seconds of a step are shared out evenly among the runs that still go on.

        Raises:
            UserError: if a folder belongs to another run or process, or the disk fails.
            Stopped: after Ctrl-C or SIGTERM, when the last complete step has been saved.
        """
        for warning in self._experiment.warnings:
            print(f"\nWARNING: {warning}\n", flush=True)
        try:
            with contextlib.ExitStack() as stack:
                runs = {seed: self._open(seed, folder, stack) for seed, folder in folders.items()}
                for start in sorted({run.start for run in runs.values() if not run.ended}):
                    if stop.signal and jax.process_count() == 1:
                        raise Stopped(None, stop.signal)
                    group = [run for run in runs.values() if run.start == start and not run.ended]
                    steps = self._compiled(len(group))
                    with Progress(self._experiment.steps, start) as progress:
                        _train(group, steps, self._experiment, self._observer, progress, stop)
                return {seed: run.failure or run.finish() for seed, run in runs.items()}
        except OSError as error:
            raise UserError(
                f"{', '.join(map(str, folders.values()))} cannot be written: "
                f"{error.strerror or error}. What was saved before is intact: make room or mend "
                "the folder, and the same command goes on from the last checkpoint."
            ) from error

    def _open(self, seed: int, folder: Path, stack: contextlib.ExitStack) -> Recorder | Follower:
        config = self._config.copy_and_resolve_references()
        config.seed = seed
        self._take(config, folder, stack)
        run: Recorder | Follower
        if devices.is_first():
            run = Recorder(config, folder, self._experiment, self._dataset, stack)
        else:
            run = Follower(config, folder, self._experiment, stack)
        run.start, run.skipped, ended = devices.from_first(run.start, run.skipped, run.ended)
        run.ended = bool(ended)
        for note in run.notes:
            print(f"\nWARNING: {note}\n", flush=True)
        return run

    def _take(self, config: ConfigDict, folder: Path, stack: contextlib.ExitStack) -> None:
        """Takes the folder, for all processes, until `stack` closes.

        Raises:
            UserError: if it belongs to another config or process.
        """
        refused: UserError | None = None
        if devices.is_first():
            try:
                stack.enter_context(rundir.locked(folder))
                rundir.take(folder, config, rundir.DataFacts.of(self._dataset))
            except UserError as error:
                refused = error
        (failed,) = devices.from_first(refused is not None)
        if failed:
            raise refused or UserError("the first process cannot begin, and says why.")

    def _compiled(self, seeds: int) -> Steps:
        if seeds not in self._steps:
            self._steps[seeds] = Steps(self._experiment, self._dataset, self._feed, seeds)
        return self._steps[seeds]


def _train(
    runs: Sequence[Recorder | Follower],
    steps: Steps,
    experiment: Experiment,
    observer: Observer,
    progress: Progress,
    stop: StopRequest,
) -> None:
    """Takes the steps of runs that all stand at the same one."""
    step, feed, target = runs[0].start, steps.feed, experiment.stop_at_loss
    items = zip(*(feed.items(run.seed, step) for run in runs), strict=True)
    states = [run.begin(steps) for run in runs]
    progress.say(_banner(runs, states[0][0].params, experiment))
    state, batch_stats = steps.join(states)
    del states  # their buffers are donated to the first step
    streak = steps.streak([run.skipped for run in runs])
    clock, saved_at, agree = Clock(), time.monotonic(), Agreement(experiment.parallel)
    # Fetched when the next steps have been dispatched: the device never waits.
    pending: tuple[int, list[tuple[Item, ...]], Metrics] | None = None

    def record(first: int, shipped: list[tuple[Item, ...]], metrics: Metrics) -> None:
        every = unstack(metrics, len(shipped), len(runs))  # waits until the steps are through
        cpu.give_back_freed_memory()
        seconds = clock.lap(len(shipped))
        if first == runs[0].start + 1 and clock.compiling > 1:
            progress.say(f"compiled in {clock.compiling:.0f} s, which the seconds leave out")
        for number, (of_runs, its_items) in enumerate(zip(every, shipped, strict=True), first):
            going_on = [i for i, run in enumerate(runs) if not run.ended]
            for i in going_on:
                runs[i].record(number, of_runs[i], seconds / len(going_on))
                if runs[i].is_lost():
                    batch = feed.batch(feed.resident, its_items[i])
                    own = steps.local(steps.split((state, batch_stats))[i])
                    runs[i].fail(number, *own, batch)
            total = jax.tree.map(lambda *leaves: np.sum(leaves), *of_runs).means()
            rate = len(runs) * experiment.batch_size / seconds
            progress.advance(total["loss"], total["accuracy"], rate)

    while not all(run.ended for run in runs):
        count = min(_steps_to_next(step, experiment), feed.max_steps)
        if target is not None:  # runs that may end before their last step wait for each loss
            count = 1
        elif jax.process_count() == 1:  # clocks of several would disagree
            count = min(count, clock.steps_in(DISPATCH_SECONDS))
        shipped = [next(items) for _ in range(count)]
        state, batch_stats, streak, metrics = steps.train(
            state, batch_stats, streak, steps.resident, *steps.ship(shipped)
        )
        if step == runs[0].start:  # while the device is busy
            for run in runs:
                run.introduce(observer)
        if pending is not None:
            record(*pending)
        pending = (step + 1, shipped, metrics)
        step += count
        # Read once: whoever is told of it below has to be saved above.
        received, timed = agree(stop.signal or 0, _is_overdue(saved_at, experiment))
        evaluates = step % experiment.eval_every == 0
        saves = timed or (experiment.save_every and step % experiment.save_every == 0)
        ending = {i for i, run in enumerate(runs) if step == experiment.steps and not run.ended}
        if target is not None:
            losses = [one.means()["loss"] for one in unstack(metrics, 1, len(runs))[0]]
            ending |= {i for i, run in enumerate(runs) if losses[i] <= target and not run.ended}
        if not (evaluates or saves or ending or received):
            continue
        record(*pending)
        pending = None
        evaluated = steps.evaluated(state, batch_stats)
        tested = steps.test(*evaluated) if evaluates or ending else None
        each = zip(runs, steps.split((state, batch_stats)), steps.split(evaluated), strict=True)
        for i, (run, own, shown) in enumerate(each):
            if run.ended:
                continue
            accuracy = None
            if tested and (evaluates or i in ending):
                means = run.test(step, tested[i], steps.local(own), steps.local(shown), observer)
                accuracy = means["accuracy"]
                which = f"seed {run.seed}, " if len(runs) > 1 else ""
                progress.say(
                    f"{which}step {step}: test loss {means['loss']:.4f}, "
                    f"test accuracy {accuracy:.4f}"
                )
            if accuracy is not None or saves or received:
                run.save(own, shown, accuracy)
            run.ended = i in ending
        saved_at = time.monotonic() if evaluates or saves else saved_at
        clock.restart()
        if received and not all(run.ended for run in runs):
            raise Stopped(step, signal.Signals(received))


def _banner(runs: Sequence[Recorder | Follower], params: Any, experiment: Experiment) -> str:
    together = f", {len(runs)} seeds in one program" if len(runs) > 1 else ""
    return (
        f"{runs[0].name}{together}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} "
        f"parameters, {runs[0].data}, steps {runs[0].start + 1} to {experiment.steps} of "
        f"{experiment.batch_size} images, on {_devices(experiment)}"
    )


def _devices(experiment: Experiment) -> str:
    devices = experiment.parallel.mesh.devices.flat
    return (
        f"{len(devices)} x {devices[0].device_kind}"
        if len(devices) > 1
        else (devices[0].device_kind)
    )


def _steps_to_next(step: int, experiment: Experiment) -> int:
    """Returns how many steps there are to the next evaluation, the next save or the end."""
    intervals = [experiment.eval_every, experiment.save_every or experiment.steps]
    return min(experiment.steps - step, *(every - step % every for every in intervals))


def _is_overdue(saved_at: float, experiment: Experiment) -> bool:
    """Returns whether the last checkpoint is as old as the config allows."""
    minutes = experiment.save_every_minutes
    return minutes is not None and time.monotonic() - saved_at > 60 * minutes
