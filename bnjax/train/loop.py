"""Training with everything around it: `train_and_evaluate(config, workdir, dataset)`."""

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from bnjax.data.batches import Rows, indices
from bnjax.data.datasets import Dataset
from bnjax.errors import NonFiniteError, UserError
from bnjax.metrics import Metrics
from bnjax.train import build
from bnjax.train.dispatch import unstack
from bnjax.train.interrupt import StopRequest
from bnjax.train.program import Program
from bnjax.train.run import Run
from bnjax.train.writers import Progress

# What the device is given at once: long beside the host's own work, short beside a user's Ctrl-C.
DISPATCH_SECONDS = 0.5

Summary = dict[str, Any]


class Stopped(Exception):
    """Ctrl-C or SIGTERM came; everything up to `step` is saved, None standing for a moment between two runs."""

    def __init__(self, step: int | None, received: signal.Signals):
        """Keeps the last complete step and the signal."""
        super().__init__(
            f"stopped by {received.name}" + ("" if step is None else f" after step {step}")
        )
        self.step, self.signal = step, received


def train_and_evaluate(config: ConfigDict, workdir: Path, dataset: Dataset) -> Summary:
    """Trains, evaluates at intervals, leaves the run's folder behind and returns its summary; goes on where it was stopped.

    Args:
        config: as `bnjax.train.config.default_config` lays it out.
        workdir: the run's folder, created if need be.
        dataset: from `bnjax.data.datasets.load`.

    Raises:
        UserError: if the config is impossible, the folder belongs to another run or process, or the disk fails.
        NonFiniteError: if more steps in a row than the config allows are not finite.
        Stopped: after Ctrl-C or SIGTERM, when the last complete step has been saved.
    """
    with StopRequest() as stop:
        (result,) = Trainer(config, dataset).train({config.seed: workdir}, stop).values()
    if isinstance(result, NonFiniteError):
        raise result
    return result


class Trainer:
    """Trains the runs of one config, whatever their seeds; what is compiled for one is used for the next."""

    def __init__(self, config: ConfigDict, dataset: Dataset):
        """Compiles nothing yet.

        Raises:
            ConfigError: if the config is impossible.
        """
        self._config, self._dataset = config, dataset
        self._experiment = build.experiment(config, dataset)
        self._programs: dict[int, Program] = {}

    def train(
        self, workdirs: Mapping[int, Path], stop: StopRequest
    ) -> dict[int, Summary | NonFiniteError]:
        """Takes the steps that are missing in each seed's folder, all in one program, and returns what each came to.

        Runs that stand at different steps, after an interruption, are taken one group after the other; in groups of another size the
        results are the same but for rounding. The seconds of a step are shared out evenly among the runs that still go on.

        Raises:
            UserError: if a folder belongs to another run or process, or the disk fails.
            Stopped: after Ctrl-C or SIGTERM, when the last complete step has been saved.
        """
        for warning in self._experiment.warnings:
            print(f"\nWARNING: {warning}\n", flush=True)
        try:
            with contextlib.ExitStack() as stack:
                runs = {
                    seed: self._open(seed, workdir, stack) for seed, workdir in workdirs.items()
                }
                for start in sorted({run.start for run in runs.values() if not run.ended}):
                    if stop.signal:
                        raise Stopped(None, stop.signal)
                    self._train(
                        [run for run in runs.values() if run.start == start and not run.ended], stop
                    )
                return {seed: run.failure or run.finish() for seed, run in runs.items()}
        except OSError as error:
            raise UserError(
                f"{', '.join(map(str, workdirs.values()))} cannot be written: {error.strerror or error}. What was saved before is intact: "
                "make room or mend the folder, and the same command goes on from the last checkpoint."
            ) from error

    def _open(self, seed: int, workdir: Path, stack: contextlib.ExitStack) -> Run:
        config = self._config.copy_and_resolve_references()
        config.seed = seed
        run = Run(config, workdir, self._experiment, self._dataset, stack)
        for note in run.notes:
            print(f"\nWARNING: {note}\n", flush=True)
        return run

    def _train(self, runs: list[Run], stop: StopRequest) -> None:
        """Takes the steps of runs that all stand at the same one."""
        if len(runs) not in self._programs:
            self._programs[len(runs)] = Program(self._experiment, self._dataset, len(runs))
        with Progress(self._experiment.steps, runs[0].start) as progress:
            _train(runs, self._programs[len(runs)], progress, stop)


def _train(runs: list[Run], program: Program, progress: Progress, stop: StopRequest) -> None:
    experiment, start, orders = program.experiment, runs[0].start, [run.order() for run in runs]
    states = [run.begin(program) for run in runs]
    parameters = sum(leaf.size for leaf in jax.tree.leaves(states[0][0].params))
    progress.say(
        f"{runs[0].name}{f', {len(runs)} seeds in one program' if len(runs) > 1 else ''}: {parameters:,} parameters, "
        f"{len(program.dataset.train.label):,} images of {program.dataset.label}, steps {start + 1} to {experiment.steps} of "
        f"{experiment.batch_size} images, on {jax.devices()[0].device_kind}"
    )
    state, batch_stats = (program.join(list(trees)) for trees in zip(*states, strict=True))
    del states  # their buffers are donated to the first step
    clock = _Clock()

    def next_rows() -> Rows:
        rows = [next(order) for order in orders]
        return rows[0] if len(rows) == 1 else np.stack([indices(of_member) for of_member in rows])

    def record(first: int, rows: list[Rows], dispatched: Metrics) -> None:
        every = unstack(dispatched, len(rows))  # waits until the steps are through
        for step, of_step, metrics, seconds in zip(
            itertools.count(first), rows, every, clock.lap(len(rows)), strict=False
        ):
            going_on = sum(not run.ended for run in runs)
            for i, run in enumerate(runs):
                if not run.ended:
                    run.record(step, program.member(metrics, i), seconds / going_on)
                    if run.is_lost():
                        run.fail(
                            step,
                            program.member(state, i),
                            program.member(batch_stats, i),
                            program.member(of_step, i),
                        )
            total = jax.tree.map(np.sum, metrics).means()
            progress.advance(
                total["loss"], total["accuracy"], len(runs) * experiment.batch_size / seconds
            )

    saved_at, step, target = time.monotonic(), start, experiment.stop_at_loss
    # Fetched when the next steps have been dispatched: the device never waits.
    pending: tuple[int, list[Rows], Metrics] | None = None
    while not all(run.ended for run in runs):
        # Runs that may end before their last step wait for the loss of each.
        count = (
            min(
                _steps_to_next(step, experiment),
                program.dispatch.most,
                clock.steps_in(DISPATCH_SECONDS),
            )
            if target is None
            else 1
        )
        rows = [next_rows() for _ in range(count)]
        state, batch_stats, metrics = program.dispatch.advance(state, batch_stats, rows)
        if step == start:  # while the device is busy
            for run in runs:
                run.show(program)
        if pending is not None:
            record(*pending)
        pending = (step + 1, rows, metrics)
        step += count
        evaluates, saves = (
            step % experiment.eval_every == 0,
            experiment.save_every is not None and step % experiment.save_every == 0,
        )
        if experiment.save_every_minutes is not None:
            saves = time.monotonic() - saved_at > 60 * experiment.save_every_minutes
        ending = (
            set(range(len(runs)))
            if step == experiment.steps
            else _at_or_below(target, program, metrics)
        )
        ending = {i for i in ending if not runs[i].ended}
        stopping = stop.signal  # read once: whoever is told of it below has to be saved above
        if not (evaluates or saves or ending or stopping):
            continue
        record(*pending)
        pending, tested = None, None
        for i, run in enumerate(runs):
            if run.ended:
                continue
            mine, accuracy = (program.member(state, i), program.member(batch_stats, i)), None
            if evaluates or i in ending:
                tested = tested or program.evaluate(state, batch_stats)
                means = run.test(step, program.member(tested, i), *mine, program)
                accuracy = means["accuracy"]
                which = f"seed {run.seed}, " if len(runs) > 1 else ""
                progress.say(
                    f"{which}step {step}: test loss {means['loss']:.4f}, test accuracy {accuracy:.4f}"
                )
            if accuracy is not None or saves or stopping:
                run.save(*mine, accuracy)
            run.ended = i in ending
        saved_at = time.monotonic() if evaluates or saves else saved_at
        clock.restart()
        if stopping and not all(run.ended for run in runs):
            raise Stopped(step, stopping)


def _steps_to_next(step: int, experiment: build.Experiment) -> int:
    """Returns how many steps there are to the next evaluation, the next save or the end, whichever comes first."""
    intervals = [experiment.eval_every, experiment.save_every or experiment.steps]
    return min(experiment.steps - step, *(every - step % every for every in intervals))


def _at_or_below(target: float | None, program: Program, metrics: Metrics) -> set[int]:
    """Returns the members whose loss in the one step of this dispatch is that low; waits for it if there is a target."""
    if target is None:
        return set()
    (only,) = unstack(metrics, 1)
    return {i for i in range(program.members) if program.member(only, i).means()["loss"] <= target}


class _Clock:
    """Seconds spent training; what lies between the end of a step and `restart` does not count."""

    def __init__(self) -> None:
        self._seconds_per_step = math.inf
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self, steps: int) -> list[float]:
        """Ends the steps of one dispatch and returns the seconds that each took."""
        now = time.perf_counter()
        self._seconds_per_step, self._last = (now - self._last) / steps, now
        return [self._seconds_per_step] * steps

    def steps_in(self, seconds: float) -> int:
        """Returns how many steps take so long, at least 1; 1 before the first one is through."""
        return max(1, int(seconds / self._seconds_per_step))
