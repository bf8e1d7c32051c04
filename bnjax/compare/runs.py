"""Reads runs and comparisons from their folders. Does not import JAX."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.compare.intervals import Times
from bnjax.errors import UserError
from bnjax.text import progress
from bnjax.train import jsonl, parsing, rundir

# Values at one point of a run: the first, last or best evaluation or training step, or any step.
VALUES = tuple(
    f"{split}_{key}" for split in ("train", "validation", "test") for key in ("loss", "accuracy")
)
# Times until a run first reaches a goal. Some runs never reach the goal.
TIMES = ("steps_to_loss", "steps_to_accuracy", "seconds_to_accuracy")
POINTS = ("first", "last", "best")
COMPARISON = "comparison.json"  # in the folder of a comparison
# The keys that may differ between runs of the same variant.
NO_VARIANT = ("config.seed", *rundir.PLACES)
START = "bn"  # the included config from which the commands that repeat runs start


@dataclasses.dataclass(frozen=True)
class Curve:
    """The loss and accuracy of one split, float [n], at `step`, int [n]; NaN if not finite."""

    step: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        folder: the folder of the run; in a comparison, `<comparison>/<variant>/<seed>`.
        variant: the name of its variant in a comparison.
        seed: the seed of the config.
        config: the values of the config, with dotted keys such as "config.seed".
        data: facts about the data set.
        metrics: the lines of metrics.jsonl.
        seconds: the training time after each step.
        summary: the content of summary.json; empty if the run is not finished.
    """

    folder: Path
    variant: str
    seed: int
    config: dict[str, Any]
    data: rundir.DataFacts
    metrics: list[dict[str, Any]]
    seconds: dict[int, float]
    summary: dict[str, Any]

    def curve(self, split: str) -> Curve:
        """Returns the curve of a split.

        "train" has values at each step, and the other splits at each evaluation. The
        "judged" split is the one that determines the best checkpoint.
        """
        split = self.chosen_by if split == "judged" else split
        lines = [line for line in self.metrics if line["split"] == split]
        return Curve(
            np.array([line["step"] for line in lines], int),
            np.array([np.nan if line["loss"] is None else line["loss"] for line in lines], float),
            np.array([line["accuracy"] for line in lines], float),
        )

    @property
    def chosen_by(self) -> str:
        """The split that determines the best checkpoint, "validation" or "test"."""
        return "validation" if self.config.get("config.data.validation") else "test"

    @functools.cached_property
    def gaps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl that compare stored and batch statistics."""
        return [line for line in self.metrics if line["split"] == "gap"]

    @functools.cached_property
    def histograms(self) -> list[dict[str, Any]]:
        """The lines of histograms.jsonl, which are read on first access."""
        return jsonl.read_lines(self.folder / "histograms.jsonl")

    @property
    def last_step(self) -> int:
        """The number of steps so far."""
        return int(self.curve("train").step[-1])

    @property
    def target_loss(self) -> float:
        """The target training loss of the run."""
        return float(self.config["config.train.target_loss"])


def value(run: Run, quantity: str, at: str | float | int) -> float | None:
    """Returns one of `VALUES`, or a judged one; None if it is not there or not finite."""
    split, key = quantity.split("_")
    curve = run.curve(split)
    values: np.ndarray = getattr(curve, key)
    if at == "best":
        values = np.sort(values[~np.isnan(values)])
        at = "first" if key == "loss" else "last"
    elif at not in POINTS:
        values = values[curve.step == at]
    found = values[0 if at == "first" else -1] if len(values) else np.nan
    return None if np.isnan(found) else float(found)


def times(runs: Sequence[Run], quantity: str, goal: float) -> Times:
    """Returns one of `TIMES` for several runs: the time to the goal, or to the end of the run.

    Times in seconds are at least 0.001, the resolution of timing.jsonl.
    """
    values, reached = [], []
    for run in runs:
        if quantity == "steps_to_loss":
            step = jsonl.first_at_or_below(run.metrics, goal)
        else:
            judged = run.curve("judged")
            step = next(iter(judged.step[judged.accuracy >= goal].tolist()), None)
        end = step or run.last_step
        values.append(max(run.seconds[end], 0.001) if quantity.startswith("seconds") else end)
        reached.append(step is not None)
    return Times(tuple(values), tuple(reached))


def read_comparison(folder: Path) -> dict[str, Any]:
    """Reads the comparison.json of a folder, as written by `bnjax.compare.grid`.

    Raises:
        UserError: if the file is missing or damaged.
    """
    with jsonl.reading(folder / COMPARISON):
        found: dict[str, Any] = json.loads((folder / COMPARISON).read_text())
        return found


def listed(folder: Path, comparison: dict[str, Any]) -> list[Path]:
    """Returns the folders of all runs in a comparison, even if they do not exist yet."""
    return [
        folder / name / str(seed) for name in comparison["variants"] for seed in comparison["seeds"]
    ]


def finished_runs(folder: Path, comparison: dict[str, Any]) -> list[Run]:
    """Reads the finished runs of a comparison, in the order of variants and seeds.

    Raises:
        UserError: if the files of a run are damaged or inconsistent.
    """
    there = [run for run in listed(folder, comparison) if (run / "summary.json").exists()]
    return [read_run(run) for run in progress(there, "reading runs", "run")]


def read_run(folder: Path) -> Run:
    """Reads the folder of a run.

    Raises:
        UserError: if there is no run, the run has no step yet, or files are damaged or
            inconsistent.
    """
    config, data = rundir.read(folder)
    metrics = jsonl.read_lines(folder / "metrics.jsonl")
    seconds = {line["step"]: line["seconds"] for line in jsonl.read_lines(folder / "timing.jsonl")}
    file, summary = folder / "summary.json", {}
    if file.exists():
        with jsonl.reading(file):
            summary = json.loads(file.read_text())
    steps = [line["step"] for line in metrics if line["split"] == "train"]
    if not steps:
        raise UserError(f"the run in {folder} has no training step yet.")
    if summary and (summary["steps"] != steps[-1] or not {*steps} <= {*seconds}):
        raise UserError(
            f"the run in {folder} is damaged: summary.json, metrics.jsonl and timing.jsonl have "
            "different steps. Restore these files from a copy, or remove the folder and train the "
            "run again with the same command."
        )
    flat = parsing.flat({"config": config.to_dict()})
    return Run(folder, folder.parent.name, config.seed, flat, data, metrics, seconds, summary)


@dataclasses.dataclass(frozen=True)
class Study:
    """The runs and comparisons of one report.

    Attributes:
        variants: the readable runs, keyed by config name; if different configs share a name, keyed
            by name and folder.
        problems: descriptions of unreadable or incomplete runs.
        comparisons: maps the folder of each comparison to the content of comparison.json and the
            finished runs.
    """

    variants: dict[str, list[Run]]
    problems: list[str]
    comparisons: dict[Path, tuple[dict[str, Any], list[Run]]]

    @property
    def runs(self) -> list[Run]:
        """All readable runs."""
        return [run for siblings in self.variants.values() for run in siblings]

    @property
    def chosen_by(self) -> str:
        """The splits by which the best checkpoints are chosen, in words."""
        return " or ".join(sorted({run.chosen_by for run in self.runs}))


def read_study(folders: Sequence[Path]) -> Study:
    """Reads the folders of runs and comparisons.

    A second run with the same config and seed is skipped, because it is not independent evidence.

    Raises:
        UserError: if no run is readable.
    """
    problems: list[str] = []
    comparisons: dict[Path, tuple[dict[str, Any], list[Run]]] = {}
    found: dict[tuple[str, str], dict[int, Run]] = {}  # keyed by name and config without the seed
    for folder in folders:
        members = [folder]
        if (folder / COMPARISON).exists():
            comparisons[folder] = read_comparison(folder), []
            wanted = listed(folder, comparisons[folder][0])
            members = [run for run in wanted if (run / "config.json").exists()]
            missing = [f"{run.parent.name}/{run.name}" for run in wanted if run not in members]
            if missing:
                problems.append(f"the comparison {folder} has not started {', '.join(missing)}.")
        for member in progress(members, "reading runs", "run"):
            try:
                run = read_run(member)
            except UserError as error:
                problems.append(f"{member} cannot be read: {error}")
                continue
            if folder in comparisons and run.summary:
                comparisons[folder][1].append(run)
            config = {key: value for key, value in run.config.items() if key not in NO_VARIANT}
            identity = (run.config["config.name"], json.dumps(config, sort_keys=True))
            other = found.setdefault(identity, {}).setdefault(run.seed, run)
            if other is not run:
                problems.append(
                    f"{member} has the same config and seed as {other.folder} and is skipped."
                )
            elif not run.summary:
                after = f"after {run.last_step} steps"
                problems.append(f"{member} is not finished; the report shows its results {after}.")
    if not found:
        raise UserError(
            f"there is no run to report. {' '.join(problems)} "
            "Train one with bnjax train --config bn."
        )
    names = [name for name, _ in found]
    variants = {}
    for (name, _), siblings in found.items():
        first = next(iter(siblings.values())).folder
        home = first.parent.parent if first.parent.parent in comparisons else first
        variants[f"{name} ({home})" if names.count(name) > 1 else name] = [*siblings.values()]
    return Study(variants, problems, comparisons)


def command(run: Run) -> list[str]:
    """Returns the command that repeats a run, with all config values that differ from `START`."""
    config, standard = dict(run.config), parsing.flat({"config": parsing.load(START, ()).to_dict()})
    if run.data.name == config["config.data.fallback"] != config["config.data.name"]:
        # The command itself appends the name of the fallback data set.
        config["config.name"] = config["config.name"].removesuffix(f"-{run.data.name}")
    words = [f"--{key}={value}" for key, value in config.items() if value != standard.get(key)]
    return ["python", "-m", "bnjax.main", "--config", START, *words]
