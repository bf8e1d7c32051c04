"""What a run came to."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.train.build import Experiment
from bnjax.train.writers import first_at_or_below, read_metrics


def summarise(
    config: ConfigDict, workdir: Path, dataset: Dataset, experiment: Experiment, seconds: float
) -> dict[str, Any]:
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
        "ended": "all steps taken"
        if steps == experiment.steps
        else f"training loss at or below {experiment.stop_at_loss:g}",
        "skipped_steps": sum(line.get("skipped", 0) for line in train),
        "batch_size": experiment.batch_size,
        "steps_to_loss": {
            f"{config.train.target_loss:g}": first_at_or_below(lines, config.train.target_loss)
        },
        "final_train": {key: train[-1][key] for key in ("loss", "accuracy")},
        "final_test": {key: tests[-1][key] for key in result},
        "best_test": {key: best[key] for key in result},
        "seconds": round(seconds, 1),
        "images_per_s": round(steps * experiment.batch_size / max(seconds, 1e-3), 1),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git": _git_revision(),
    }


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    packages = ("bnjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in packages
    }


def _git_revision() -> str | None:
    """Returns the revision of the code where it runs from a clone, else None."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
