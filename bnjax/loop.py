"""Training with everything around it: `train_and_evaluate(config, workdir, dataset)`."""

import functools
import itertools
import math
import platform
import signal
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bnjax import config as configs
from bnjax import dispatch as dispatches
from bnjax import workdir as workdirs
from bnjax.arrays import Batch, BatchStats
from bnjax.checkpoint import Checkpoints
from bnjax.data.batches import Rows, eval_batches, take, train_rows
from bnjax.data.sources import Dataset
from bnjax.diagnose import first_nonfinite
from bnjax.errors import NonFiniteError, UserError
from bnjax.evaluate import evaluate
from bnjax.metrics import Metrics
from bnjax.platform import compiler_options, memory
from bnjax.signals import StopRequest
from bnjax.train_step import TrainState, eval_step, init_state, train_step
from bnjax.watch import Watch
from bnjax.writers import Progress, RunWriter, read_lines, read_metrics, write_json

# What the device is given at once: long beside the host's own work, short beside a user's Ctrl-C.
DISPATCH_SECONDS = 0.5


class Stopped(Exception):
    """Ctrl-C or SIGTERM came; everything up to `step` is saved."""

    def __init__(self, step: int, received: signal.Signals):
        """Keeps the last complete step and the signal."""
        super().__init__(f"stopped by {received.name} after step {step}")
        self.step, self.signal = step, received


def train_and_evaluate(config: ConfigDict, workdir: Path, dataset: Dataset) -> dict[str, Any]:
    """Trains, evaluates at intervals, leaves the run's folder behind and returns its summary; goes on where it was stopped.

    Args:
        config: as `bnjax.defaults.get_config` lays it out.
        workdir: the run's folder, created if need be.
        dataset: from `bnjax.data.sources.load`.

    Raises:
        UserError: if the config is impossible, the folder belongs to another run or process, or the disk fails.
        NonFiniteError: if more steps in a row than the config allows are not finite.
        Stopped: after Ctrl-C or SIGTERM, when the last complete step has been saved.
    """
    experiment = configs.build(config, dataset)
    with workdirs.locked(workdir):
        workdirs.claim(workdir, config, workdirs.DataFacts.of(dataset))
        for warning in experiment.warnings:
            print(f"\nWARNING: {warning}\n", flush=True)
        try:
            seconds = _train(config, experiment, workdir, dataset)
            summary = summarise(config, workdir, dataset, experiment, seconds)
            write_json(workdir / "summary.json", summary)
        except OSError as error:
            raise UserError(
                f"{workdir} cannot be written: {error.strerror or error}. What was saved before is intact: make room or mend the folder, "
                "and the same command goes on from the last checkpoint."
            ) from error
    return summary


def _train(config: ConfigDict, experiment: configs.Experiment, workdir: Path, dataset: Dataset) -> float:
    """Takes the steps that are missing and returns the seconds that all of them took."""
    model, train, test = experiment.model, dataset.train, dataset.test
    options = compiler_options()
    init_key, order_key = jax.random.split(jax.random.key(config.seed))
    init_fn = jax.jit(functools.partial(init_state, model, experiment.tx))
    # A step that is not finite is always dropped; what differs is how many the loop puts up with.
    step_fn = functools.partial(train_step, model=model, tx=experiment.tx, skip_nonfinite=True)
    dispatch = dispatches.build(step_fn, train, experiment.batch_size, options)
    _check_memory(jax.eval_shape(init_fn, init_key, train.image[:1]))
    eval_fn = jax.jit(functools.partial(eval_step, model=model), compiler_options=options)
    about = {"config": config.to_dict(), "versions": versions(), "norm": workdirs.norm_conventions(config)}

    with StopRequest() as stop, Checkpoints(workdir / "checkpoints") as checkpoints:
        newest, notes = checkpoints.newest_intact()
        for note in notes:
            print(f"\nWARNING: {note}\n", flush=True)
        if newest is None:
            state, batch_stats = init_fn(init_key, train.image[:1])
        else:
            state, batch_stats = checkpoints.restore(newest, jax.eval_shape(init_fn, init_key, train.image[:1]))
        start = int(state.step)
        order = train_rows(len(train.label), experiment.batch_size, key=order_key if experiment.shuffle else None, start=start)
        clock = _Clock(_seconds_so_far(workdir, start))
        with RunWriter(workdir, start=start) as writer, Progress(experiment.steps, start) as progress:
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            progress.say(
                f"{config.name}: {parameters:,} parameters, {len(train.label):,} images of {dataset.label}, steps {start + 1} to "
                f"{experiment.steps} of {experiment.batch_size} images, on {jax.devices()[0].device_kind}"
            )
            watch = Watch(experiment, dataset, writer)
            if newest is None:
                watch.begin(config)
            skipped_in_a_row = 0

            def record(first: int, rows: list[Rows], dispatched: Metrics) -> None:
                nonlocal skipped_in_a_row
                every = dispatches.unstack(dispatched, len(rows))  # waits until the steps are through
                for step, of_step, metrics, seconds in zip(itertools.count(first), rows, every, clock.lap(len(rows)), strict=False):
                    means, skipped = metrics.means(), bool(metrics.skipped)
                    skipped_in_a_row = skipped_in_a_row + 1 if skipped else 0
                    rate = experiment.batch_size / clock.seconds_per_step
                    writer.train(step, means, skipped=skipped)
                    writer.timing(step, seconds, rate)
                    progress.advance(means["loss"], means["accuracy"], rate)
                    if skipped_in_a_row > experiment.most_skipped:
                        writer.flush()
                        before = state.replace(step=jax.numpy.int32(step - 1))
                        raise _nonfinite(step, skipped_in_a_row, before, batch_stats, take(train, of_step), experiment, checkpoints.steps())

            saved_at, step = time.monotonic(), start
            # Fetched when the next steps have been dispatched: the device never waits.
            pending: tuple[int, list[Rows], Metrics] | None = None
            target = experiment.stop_at_loss
            ends = target is not None and _first_at_or_below(read_metrics(workdir / "metrics.jsonl"), target) is not None
            while step < experiment.steps and not ends:
                # A run that may end before its last step waits for the loss of each.
                count = min(_steps_to_next(step, experiment), dispatch.most, clock.steps_in(DISPATCH_SECONDS)) if target is None else 1
                rows = [next(order) for _ in range(count)]
                state, batch_stats, metrics = dispatch.advance(state, batch_stats, rows)
                if pending is not None:
                    record(*pending)
                pending = (step + 1, rows, metrics)
                step += count
                ends = step == experiment.steps or (target is not None and dispatches.unstack(metrics, 1)[0].means()["loss"] <= target)
                evaluates = step % experiment.eval_every == 0 or ends
                saves = experiment.save_every is not None and step % experiment.save_every == 0
                if experiment.save_every_minutes is not None:
                    saves = time.monotonic() - saved_at > 60 * experiment.save_every_minutes
                if not evaluates and not saves and not stop.signal:
                    continue
                record(*pending)
                pending, accuracy = None, None
                if evaluates:
                    tested = evaluate(eval_fn, state.params, batch_stats, eval_batches(test.image, test.label, experiment.eval_batch_size))
                    means = tested.means()
                    accuracy = means["accuracy"]
                    writer.test(step, means, count=int(tested.count))
                    watch.look(step, state, batch_stats)
                    progress.say(f"step {step}: test loss {means['loss']:.4f}, test accuracy {accuracy:.4f}")
                writer.flush()  # first, so that a checkpoint never knows more than the files
                checkpoints.save(state, batch_stats, accuracy, about)
                saved_at = time.monotonic()
                clock.restart()
                if stop.signal and not ends:
                    raise Stopped(step, stop.signal)
            writer.board.finished()
    return clock.seconds


def _check_memory(initial: Any) -> None:
    """Refuses what cannot fit: XLA would say so late, or wait for ever."""
    needed, room = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(initial)), memory()
    if room is not None and needed > room:
        raise UserError(
            f"the parameters and the optimizer's state take {needed / 2**30:,.0f} GiB, and {jax.devices()[0].device_kind} has "
            f"{room / 2**30:,.0f}. Make the layers smaller: --config.model.filters, --config.model.dense."
        )


def _steps_to_next(step: int, experiment: configs.Experiment) -> int:
    """Returns how many steps there are to the next evaluation, the next save or the end, whichever comes first."""
    intervals = [experiment.eval_every, experiment.save_every or experiment.steps]
    return min(experiment.steps - step, *(every - step % every for every in intervals))


def _nonfinite(
    step: int, in_a_row: int, state: TrainState, batch_stats: BatchStats, batch: Batch, experiment: configs.Experiment, saved: list[int]
) -> NonFiniteError:
    found = first_nonfinite(state, batch_stats, batch, model=experiment.model)
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


def summarise(config: ConfigDict, workdir: Path, dataset: Dataset, experiment: configs.Experiment, seconds: float) -> dict[str, Any]:
    """Returns what a run came to, read from its own metrics.jsonl."""
    lines = read_metrics(workdir / "metrics.jsonl")
    train = [line for line in lines if line["split"] == "train"]
    tests = [line for line in lines if line["split"] == "test"]
    steps = train[-1]["step"]
    best = max(tests, key=lambda line: line["accuracy"])
    result = ("step", "loss", "accuracy", "count")
    return {
        "name": config.name,
        "dataset": dataset.label,
        "official_pixels": dataset.official,
        "fallback_reason": dataset.fallback_reason,
        "steps": steps,
        "ended": "all steps taken" if steps == experiment.steps else f"training loss at or below {experiment.stop_at_loss:g}",
        "skipped_steps": sum(line.get("skipped", 0) for line in train),
        "batch_size": experiment.batch_size,
        "steps_to_loss": {f"{config.train.target_loss:g}": _first_at_or_below(lines, config.train.target_loss)},
        "final_train": {key: train[-1][key] for key in ("loss", "accuracy")},
        "final_test": {key: tests[-1][key] for key in result},
        "best_test": {key: best[key] for key in result},
        "seconds": round(seconds, 1),
        "images_per_s": round(steps * experiment.batch_size / seconds, 1),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git": _git_revision(),
    }


def _first_at_or_below(lines: list[dict[str, Any]], loss: float) -> int | None:
    """Returns the first step whose training loss was that low, None if none was."""
    train = (line for line in lines if line["split"] == "train" and line["loss"] is not None)
    return next((line["step"] for line in train if line["loss"] <= loss), None)


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    packages = ("bnjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


class _Clock:
    """Seconds spent training; what lies between the end of a step and `restart` does not count."""

    def __init__(self, seconds: float):
        self.seconds, self.seconds_per_step = seconds, math.inf
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self, steps: int) -> list[float]:
        """Ends the steps of one dispatch and returns the seconds so far at the end of each."""
        now = time.perf_counter()
        before, self.seconds = self.seconds, self.seconds + now - self._last
        self.seconds_per_step, self._last = (now - self._last) / steps, now
        return [before + (i + 1) * self.seconds_per_step for i in range(steps)]

    def steps_in(self, seconds: float) -> int:
        """Returns how many steps take so long, at least 1; 1 before the first one is through."""
        return max(1, int(seconds / self.seconds_per_step))


def _seconds_so_far(workdir: Path, step: int) -> float:
    seconds = next((line.get("seconds") for line in read_lines(workdir / "timing.jsonl") if line["step"] == step), None)
    return seconds if isinstance(seconds, float) else 0.0


def _git_revision() -> str | None:
    """Returns the revision of the code where it runs from a clone, else None."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
