"""What the runs of a comparison came to: read from their folders, a value or a time at a time."""

import json
from pathlib import Path
from typing import Any

from bnjax.compare.intervals import Times
from bnjax.errors import UserError
from bnjax.train.records import read_lines, read_metrics

# Read at one point of a run: the first, the last or the best evaluation (of the training set: step), or a given step.
VALUES = {
    name: tuple(name.split("_"))
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
}
# Read off a run as the time until something was reached first, which may not have happened: steps or seconds of training.
TIMES = ("steps_to_loss", "steps_to_accuracy", "seconds_to_accuracy")
POINTS = ("first", "last", "best")


def read_runs(folder: Path, comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns what is there of each run of a comparison: `variant`, `seed`, `summary` (None while it is unfinished), `metrics`, `timing`.

    Raises:
        UserError: if a file is damaged.
    """
    runs = []
    for variant in comparison["variants"]:
        for seed in comparison["seeds"]:
            run = folder / variant / str(seed)
            found = {
                "metrics": read_metrics(run / "metrics.jsonl"),
                "timing": read_lines(run / "timing.jsonl"),
            }
            if any(type(line.get("seconds")) is not float for line in found["timing"]):
                raise UserError(f"{run / 'timing.jsonl'} is damaged: a line has no seconds.")
            runs.append(
                {
                    "variant": variant,
                    "seed": seed,
                    "summary": _summary(run, seed, found["metrics"]),
                    **found,
                }
            )
    return runs


def _summary(run: Path, seed: int, metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not (run / "summary.json").exists():
        return None
    last = max((line["step"] for line in metrics if line["split"] == "train"), default=None)
    tested = any(line["split"] == "test" for line in metrics)
    try:
        summary, config = (
            json.loads((run / name).read_bytes()) for name in ("summary.json", "config.json")
        )
        if tested and summary["steps"] == last and config["config"]["seed"] == seed:
            return summary
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        pass
    raise UserError(
        f"the run in {run} is damaged: metrics.jsonl, summary.json and config.json are not of one finished run of seed {seed}. Restore "
        "them from a copy, or remove that folder, and the same command trains it anew."
    )


def value(run: dict[str, Any], quantity: str, at: str | float | int) -> float | None:
    """Returns one of `VALUES` of a run; None if that step is missing or its loss was not finite."""
    split, key = VALUES[quantity]
    found = [
        line
        for line in run["metrics"]
        if line["split"] == split and (at in POINTS or line["step"] == at)
    ]
    if at == "best":
        finite = [line[key] for line in found if line[key] is not None]
        return (min if key == "loss" else max)(finite, default=None)
    return found[0 if at == "first" else -1][key] if found else None


def time(run: dict[str, Any], quantity: str, goal: float | int) -> tuple[float | int, bool]:
    """Returns one of `TIMES` of a run, and True; or how long it went on without getting there, and False."""
    unit, _, key = quantity.split("_")
    split, sign = ("train", 1) if key == "loss" else ("test", -1)
    lines = [line for line in run["metrics"] if line["split"] == split and line[key] is not None]
    step = next((line["step"] for line in lines if sign * line[key] <= sign * goal), None)
    last = max(line["step"] for line in run["metrics"])
    if unit == "steps":
        return step or last, step is not None
    seconds = {line["step"]: line["seconds"] for line in run["timing"]}
    if (step or last) not in seconds:
        raise UserError(
            f"timing.jsonl of {run['variant']}/{run['seed']} is damaged: it has no step {step or last}. Remove that run's folder, and the "
            "same command trains it anew."
        )
    return max(seconds[step or last], 0.001), step is not None  # the resolution of the file


def times(runs: list[dict[str, Any]], quantity: str, goal: float | int) -> Times:
    """Returns one of `TIMES` of several runs."""
    found = [time(run, quantity, goal) for run in runs]
    return Times(tuple(taken for taken, _ in found), tuple(reached for _, reached in found))
