"""Trains and evaluates a run: `train_and_evaluate(config, workdir, dataset)`."""

import contextlib
import functools
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.data.feed import Feed
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build
from bnjax.train.devices import Agreement
from bnjax.train.diagnostics import Observer
from bnjax.train.dispatch import default_feed, dispatch_size
from bnjax.train.interrupt import Stopped, StopRequest
from bnjax.train.jsonl import OnMetrics
from bnjax.train.run import Run, Seed
from bnjax.train.steps import Steps

Summary = dict[str, Any]


def train_and_evaluate(
    config: ConfigDict, workdir: Path, dataset: Dataset, *, on_metrics: OnMetrics | None = None
) -> Summary:
    """Trains and evaluates one run, writes its folder and returns its summary.

    Resumes an interrupted run. Only the first of several processes returns a summary; the others
    return an empty dict.

    Args:
        config: a config made from `bnjax.train.config.default_config`.
        workdir: the run's folder, created if it does not exist.
        dataset: the data set, from `bnjax.train.build.dataset`.
        on_metrics: a function (step, split, values) -> None. The first process calls it for each
            line that it writes to metrics.jsonl, while the device computes. The values are numbers
            keyed by name, for instance "loss" or, for a norm, "drift_mean/LAYER". If the function
            raises an error, the latest step is saved before training ends.

    Raises:
        UserError: if the config is invalid, the folder belongs to a different run or process, or
            the disk fails.
        Exception: any error raised by `on_metrics`.
        NonFiniteError: if more consecutive steps are non-finite than the config allows.
        Stopped: after Ctrl-C or SIGTERM, with the last complete step saved.
    """
    with StopRequest() as stop:
        trainer, folders = Trainer(config, dataset), {config.seed: workdir}
        (result,) = trainer.train(folders, stop, on_metrics).values()
    if isinstance(result, NonFiniteError):
        raise result
    return result


class Trainer:
    """Trains a config with any number of seeds, and reuses the compiled functions."""

    def __init__(self, config: ConfigDict, dataset: Dataset, feed: Feed | None = None):
        """Prepares the experiment; functions are compiled at the first step.

        Raises:
            ConfigError: if the config is invalid.
        """
        self._config, self._dataset = config, dataset
        self._experiment = build.experiment(config, dataset)
        self._observer = Observer(self._experiment, dataset, config.eval)
        feed = feed or default_feed(self._experiment, dataset.train)
        self._steps = functools.cache(functools.partial(Steps, self._experiment, dataset, feed))

    def train(
        self, folders: Mapping[int, Path], stop: StopRequest, on_metrics: OnMetrics | None = None
    ) -> dict[int, Summary | NonFiniteError]:
        """Trains all seeds in one program, each from its last step, and returns their results.

        After an interruption, seeds may be at different steps. Seeds at the same step form a group,
        and the groups train one after another. The size of a group changes results only by
        rounding. The duration of a step is divided evenly among the seeds of a group.

        Args:
            folders: the folder of each seed.
            stop: a request to stop, which is checked after each step.
            on_metrics: as for `train_and_evaluate`.

        Raises:
            UserError: if a folder belongs to a different run or process, or the disk fails.
            Stopped: after Ctrl-C or SIGTERM, with the last complete step saved.
        """
        hook = stop.guarding(on_metrics) if on_metrics else None
        for warning in self._experiment.warnings:
            print(f"\nWARNING: {warning}\n", flush=True)
        try:
            with contextlib.ExitStack() as stack:
                seeds = [
                    Seed(self._config, seed, folder, self._experiment, self._dataset, hook, stack)
                    for seed, folder in folders.items()
                ]
                for start in sorted({seed.start for seed in seeds if not seed.ended}):
                    # Several processes stop together, after a step on which they agree.
                    if stop.signal and jax.process_count() == 1:
                        raise stop.failure or Stopped(None, stop.signal)
                    group = [seed for seed in seeds if seed.start == start and not seed.ended]
                    steps = self._steps(len(group))
                    with contextlib.closing(Run(group, steps, self._observer)) as run:
                        _train(run, steps, stop)
                results = {seed.number: seed.failure or seed.finish() for seed in seeds}
            if stop.failure:
                raise stop.failure
            return results
        except OSError as error:
            raise UserError(
                f"{', '.join(map(str, folders.values()))} cannot be written: "
                f"{error.strerror or error}. Saved checkpoints are intact: free some space or make "
                "the folder writable, and the same command resumes training from the last one."
            ) from error


def _train(run: Run, steps: Steps, stop: StopRequest) -> None:
    """Trains seeds that are at the same step until all of them have ended."""
    step, feed, experiment = run.start, steps.feed, steps.experiment
    items = zip(*(feed.items(seed.number, step) for seed in run.seeds), strict=True)
    state, batch_stats, bad_steps = run.begin()
    pending: Any = None  # the latest dispatch, whose metrics are still on the device
    agree = Agreement(experiment.parallel)
    while not run.ended:
        # Takes one step on a CPU, or several on an accelerator up to the next evaluation or save.
        # On the device, each step augments `feed.batch(resident, item)` and calls `train_step`.
        size = dispatch_size(experiment, feed, step, run.step_seconds)
        dispatch = [next(items) for _ in range(size)]
        state, batch_stats, bad_steps, metrics = steps.train(
            state, batch_stats, bad_steps, dispatch
        )
        if pending:
            run.log((state, batch_stats), *pending)  # while the device computes
        pending = step + 1, dispatch, metrics
        step += len(dispatch)

        # Decides what follows these steps. A signal that arrives later is handled after the next
        # steps.
        received, overdue = agree(stop.signal or 0, run.is_overdue())
        evaluates = step % experiment.eval_every == 0 or step == experiment.steps
        saves = bool(overdue or received) or step % experiment.save_every == 0
        if evaluates or saves or experiment.stop_at_loss:
            run.log((state, batch_stats), *pending)
            pending = None
        if (evaluates or saves or run.is_finishing) and not run.ended:
            evaluated = steps.evaluated(state, batch_stats)
            if evaluates or run.is_finishing:
                run.test(step, (state, batch_stats), evaluated, everyone=evaluates)
            run.save((state, batch_stats), evaluated, everyone=evaluates or saves)
        if received and not run.ended:
            raise stop.failure or Stopped(step, signal.Signals(received))
