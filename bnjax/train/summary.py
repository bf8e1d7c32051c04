"""Computes the summary of a run: its results, and the versions and device that gave them."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.train.build import Experiment
from bnjax.train.jsonl import first_at_or_below, read_lines


def summarise(
    config: ConfigDict, workdir: Path, dataset: Dataset, experiment: Experiment, seconds: float
) -> dict[str, Any]:
    """Returns the summary of a run, computed from its metrics.jsonl."""
    lines = read_lines(workdir / "metrics.jsonl")
    train = [line for line in lines if line["split"] == "train"]
    tests = [line for line in lines if line["split"] == "test"]
    steps, (chosen_by, _) = train[-1]["step"], dataset.chosen_by
    judged = [line for line in lines if line["split"] == chosen_by]
    best = max(judged, key=lambda line: line["accuracy"])
    result = ("step", "loss", "accuracy", "count")
    ended = f"training loss at or below {experiment.stop_at_loss or 0:g}"
    if steps == experiment.steps:
        ended = "all steps taken"
    elif judged.index(best) + experiment.patience < len(judged) and experiment.patience:
        ended = f"{experiment.patience} evaluations without a better accuracy"
    return {
        "name": config.name,
        "dataset": dataset.label,
        "official_pixels": dataset.official,
        "fallback_reason": dataset.fallback_reason,
        "steps": steps,
        "ended": ended,
        "skipped_steps": sum(line.get("skipped", 0) for line in train),
        "batch_size": experiment.batch_size,
        "steps_to_loss": {
            f"{config.train.target_loss:g}": first_at_or_below(lines, config.train.target_loss)
        },
        "final_train": {key: train[-1][key] for key in ("loss", "accuracy")},
        "final_test": {key: tests[-1][key] for key in result},
        f"best_{chosen_by}": {key: best[key] for key in result},
        "chosen_by": f"{chosen_by} images",
        "seconds": round(seconds, 1),
        "images_per_s": round(steps * experiment.batch_size / max(seconds, 1e-3), 1),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git": _git_revision(),
    }


def as_text(summary: dict[str, Any]) -> str:
    """Returns the results of a run as a few lines of text."""
    target, reached = next(iter(summary["steps_to_loss"].items()))
    chosen_by, last = summary["chosen_by"].split()[0], summary["final_test"]
    best = summary[f"best_{chosen_by}"]
    first = "not reached" if reached is None else f"first at step {reached}"
    return "\n".join(
        [
            f"\n{summary['name']} on {summary['dataset']}, {summary['steps']} steps of "
            f"{summary['batch_size']} images:",
            f"  training loss at or below {target}: {first}; accuracy of the last batch "
            f"{summary['final_train']['accuracy']:.4f}",
            f"  test accuracy {last['accuracy']:.4f}, loss {last['loss']:.4f} at the end; "
            f"all {last['count']:,} test images",
            f"  best {chosen_by} accuracy {best['accuracy']:.4f}, loss {best['loss']:.4f} at step "
            f"{best['step']}; the best checkpoint is chosen by the {summary['chosen_by']}",
            f"  {summary['seconds']:,.0f} s of training, {summary['images_per_s']:,.0f} images/s "
            f"on {summary['device']}",
        ]
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    packages = ("bnjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # bnjax itself, run from a clone
        return "not installed"


def _git_revision(package: Path = Path(__file__).parents[1]) -> str | None:
    """Returns the git revision of the package, or None if no repository tracks it.

    An installed package may lie inside another project's repository, which does not track it.
    """
    git = ["git", "-C", str(package)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "."], capture_output=True, check=True)
        command = [*git, "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
