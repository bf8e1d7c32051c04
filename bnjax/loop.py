"""Training with everything around it: `train_and_evaluate(config, workdir, dataset)`."""

import functools
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
from bnjax import workdir as workdirs
from bnjax.checkpoint import Checkpoints
from bnjax.data.batches import eval_batches, train_batches
from bnjax.data.sources import Dataset
from bnjax.evaluate import evaluate
from bnjax.metrics import Metrics
from bnjax.platform import compiler_options
from bnjax.signals import StopRequest
from bnjax.train_step import eval_step, init_state, train_step
from bnjax.writers import Progress, RunWriter, read_lines, write_json


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
        UserError: if the config is impossible, or the folder belongs to another one.
        Stopped: after Ctrl-C or SIGTERM, when the last complete step has been saved.
    """
    experiment = configs.build(config, dataset)
    workdirs.claim(workdir, config, workdirs.DataFacts.of(dataset))
    for warning in experiment.warnings:
        print(f"\nWARNING: {warning}\n", flush=True)

    train, test = dataset.train, dataset.test
    options = compiler_options()
    init_key, order_key = jax.random.split(jax.random.key(config.seed))
    init_fn = jax.jit(functools.partial(init_state, experiment.model, experiment.tx, init_key))
    bound = functools.partial(train_step, model=experiment.model, tx=experiment.tx)
    step_fn = jax.jit(bound, donate_argnums=(0, 1), compiler_options=options)
    eval_fn = jax.jit(functools.partial(eval_step, model=experiment.model), compiler_options=options)

    with StopRequest() as stop, Checkpoints(workdir / "checkpoints") as checkpoints:
        if saved := checkpoints.steps():
            state, batch_stats = checkpoints.restore(saved[-1], jax.eval_shape(init_fn, train.image[:1]))
        else:
            state, batch_stats = init_fn(train.image[:1])
        start = int(state.step)
        key = order_key if experiment.shuffle else None
        batches = train_batches(train.image, train.label, experiment.batch_size, key=key, start=start)
        clock = _Clock(_seconds_so_far(workdir))
        with RunWriter(workdir, start=start) as writer, Progress(experiment.steps, start) as progress:
            parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
            progress.say(
                f"{config.name}: {parameters:,} parameters, {len(train.label):,} images of {dataset.label}, steps {start + 1} to "
                f"{experiment.steps} of {experiment.batch_size} images, on {jax.devices()[0].device_kind}"
            )

            def record(step: int, metrics: Metrics) -> None:
                means = metrics.means()  # waits until the step is through
                rate = clock.lap(int(metrics.count))
                writer.train(step, means)
                writer.timing(step, clock.seconds, rate)
                progress.advance(means["loss"], means["accuracy"], rate)

            pending: Metrics | None = None  # fetched when the next step has been dispatched, so that the device never waits for Python
            for step in range(start + 1, experiment.steps + 1):
                state, batch_stats, metrics = step_fn(state, batch_stats, next(batches))
                if pending is not None:
                    record(step - 1, pending)
                pending = metrics
                evaluates = step % experiment.eval_every == 0 or step == experiment.steps
                if not evaluates and not stop.signal:
                    continue
                record(step, pending)
                pending, accuracy = None, None
                if evaluates:
                    tested = evaluate(eval_fn, state.params, batch_stats, eval_batches(test.image, test.label, experiment.eval_batch_size))
                    means = tested.means()
                    accuracy = means["accuracy"]
                    writer.test(step, means, count=int(tested.count))
                    progress.say(f"step {step}: test loss {means['loss']:.4f}, test accuracy {accuracy:.4f}")
                writer.flush()  # first, so that a checkpoint never knows more than the files
                checkpoints.save(state, batch_stats, accuracy)
                clock.restart()
                if stop.signal and step < experiment.steps:
                    raise Stopped(step, stop.signal)

    summary = summarise(config, workdir, dataset, experiment, clock.seconds)
    write_json(workdir / "summary.json", summary)
    return summary


def summarise(config: ConfigDict, workdir: Path, dataset: Dataset, experiment: configs.Experiment, seconds: float) -> dict[str, Any]:
    """Returns what a run came to, read from its own metrics.jsonl."""
    lines = read_lines(workdir / "metrics.jsonl")
    train = [line for line in lines if line["split"] == "train"]
    tests = [line for line in lines if line["split"] == "test"]
    reached = next((line["step"] for line in train if line["loss"] <= config.train.target_loss), None)
    best = max(tests, key=lambda line: line["accuracy"])
    result = ("step", "loss", "accuracy", "count")
    packages = ("bnjax", "jax", "flax", "optax", "orbax-checkpoint")
    return {
        "name": config.name,
        "dataset": dataset.label,
        "official_pixels": dataset.official,
        "fallback_reason": dataset.fallback_reason,
        "steps": experiment.steps,
        "batch_size": experiment.batch_size,
        "steps_to_loss": {f"{config.train.target_loss:g}": reached},
        "final_train": {key: train[-1][key] for key in ("loss", "accuracy")},
        "final_test": {key: tests[-1][key] for key in result},
        "best_test": {key: best[key] for key in result},
        "seconds": round(seconds, 1),
        "images_per_s": round(experiment.steps * experiment.batch_size / seconds, 1),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in packages},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git": _git_revision(),
    }


class _Clock:
    """Seconds spent training; what lies between the end of a step and `restart` does not count."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self, images: int) -> float:
        """Ends a step and returns its images per second."""
        now = time.perf_counter()
        lap, self._last = now - self._last, now
        self.seconds += lap
        return images / lap


def _seconds_so_far(workdir: Path) -> float:
    lines = read_lines(workdir / "timing.jsonl")
    return lines[-1]["seconds"] if lines else 0.0


def _git_revision() -> str | None:
    """Returns the revision of the code where it runs from a clone, else None."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
