"""Training with everything around it: `train_and_evaluate(config, workdir)`."""

import dataclasses
import functools
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bnjax import config as configs
from bnjax import workdir as workdirs
from bnjax.arrays import BatchStats
from bnjax.checkpoint import Checkpoints
from bnjax.data.batches import eval_batches, train_batches
from bnjax.data.sources import Dataset
from bnjax.evaluate import evaluate
from bnjax.metrics import Metrics
from bnjax.platform import compiler_options
from bnjax.train_step import TrainState, eval_step, init_state, train_step
from bnjax.writers import Progress, RunWriter, read_lines, write_json


class Interrupted(Exception):
    """Ctrl-C came; everything up to `step` is saved."""

    def __init__(self, step: int):
        """Keeps the step."""
        self.step = step


def train_and_evaluate(config: ConfigDict, workdir: Path, dataset: Dataset) -> dict[str, Any]:
    """Trains, evaluates at intervals, leaves the run's folder behind and returns its summary; goes on where it was interrupted.

    Args:
        config: as `bnjax.defaults.get_config` lays it out.
        workdir: the run's folder, created if need be.
        dataset: from `bnjax.data.sources.load`.

    Raises:
        UserError: if the config is impossible, or the folder belongs to another one.
        Interrupted: after Ctrl-C, when the last complete step has been saved.
    """
    experiment = configs.build(config, dataset)
    workdirs.claim(workdir, config, workdirs.DataFacts.of(dataset))
    for warning in experiment.warnings:
        print(f"\nWARNING: {warning}\n", flush=True)

    init_key, order_key = jax.random.split(jax.random.key(config.seed))
    init = functools.partial(init_state, experiment.model, experiment.tx, init_key)
    options = compiler_options()
    bound = functools.partial(train_step, model=experiment.model, tx=experiment.tx)
    step_fn = jax.jit(bound, donate_argnums=(0, 1), compiler_options=options)
    eval_fn = jax.jit(functools.partial(eval_step, model=experiment.model), compiler_options=options)

    def test(state: TrainState, batch_stats: BatchStats) -> Metrics:
        batches = eval_batches(dataset.test.image, dataset.test.label, experiment.eval_batch_size)
        return evaluate(eval_fn, state.params, batch_stats, batches)

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        images = dataset.train.image[:1]
        if saved := checkpoints.steps():
            state, batch_stats = checkpoints.restore(saved[-1], jax.eval_shape(init, images))
        else:
            state, batch_stats = jax.jit(init)(images)
        start = int(state.step)
        writer, progress = RunWriter(workdir, start=start), Progress(experiment.steps, start)
        batches = train_batches(
            dataset.train.image, dataset.train.label, experiment.batch_size, key=order_key if experiment.shuffle else None, start=start
        )
        clock = _Clock(_seconds_so_far(workdir))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        progress.say(
            f"{config.name}: {parameters:,} parameters, {len(dataset.train.label):,} images of {dataset.label}, "
            f"steps {start + 1} to {experiment.steps} of {experiment.batch_size} images, on {jax.devices()[0].device_kind}"
        )

        def record(step: int, metrics: Metrics) -> None:
            means = metrics.means()  # waits until the step is through
            rate = clock.lap(int(metrics.count))
            writer.train(step, means)
            writer.timing(step, clock.seconds, rate)
            progress.advance(means["loss"], means["accuracy"], rate)

        pending: Metrics | None = None
        step = start
        try:
            for step in range(start + 1, experiment.steps + 1):
                state, batch_stats, metrics = step_fn(state, batch_stats, next(batches))
                # The metrics of a step are fetched when the next one has been dispatched, so the device never waits for Python.
                if pending is not None:
                    record(step - 1, pending)
                pending = metrics
                if step % experiment.eval_every == 0 or step == experiment.steps:
                    record(step, pending)
                    pending = None
                    tested = test(state, batch_stats)
                    means = tested.means()
                    writer.test(step, means, count=int(tested.count))
                    writer.flush()
                    progress.say(f"step {step}: test loss {means['loss']:.4f}, test accuracy {means['accuracy']:.4f}")
                    checkpoints.save(state, batch_stats, means["accuracy"])
                    clock.restart()
        except KeyboardInterrupt:
            if pending is not None:
                record(int(state.step), pending)
            writer.flush()
            checkpoints.save(state, batch_stats, None)
            raise Interrupted(int(state.step)) from None
        finally:
            writer.close()
            progress.close()

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
        "images_per_s": round(experiment.steps * experiment.batch_size / seconds, 1) if seconds else None,
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint")},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git": _git_revision(),
    }


@dataclasses.dataclass
class _Clock:
    """Seconds of training, evaluation and saving left out."""

    seconds: float

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._last = time.perf_counter()

    def lap(self, images: int) -> float:
        now = time.perf_counter()
        lap, self._last = now - self._last, now
        self.seconds += lap
        return images / lap


def _seconds_so_far(workdir: Path) -> float:
    lines = read_lines(workdir / "timing.jsonl")
    return lines[-1]["seconds"] if lines else 0.0


def _git_revision() -> str | None:
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
