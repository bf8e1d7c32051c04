"""Many runs, read from their folders."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.compare.intervals import Times
from bnjax.errors import UserError
from bnjax.train import parsing
from bnjax.train.config import default_config
from bnjax.train.rundir import first_at_or_below, read_lines, read_metrics

# Read at one point of a run: its first, last or best evaluation (of training: step), or a step.
VALUES = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
# Read off a run as the time until something was reached first, which may not have happened.
TIMES = ("steps_to_loss", "steps_to_accuracy", "seconds_to_accuracy")
POINTS = ("first", "last", "best")
COMPARISON = "comparison.json"  # of a folder of many runs


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of one split: `step` int [n], `loss` and `accuracy` float [n], NaN if not finite."""

    step: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, finished or not.

    Attributes:
        folder: where it lies; in a comparison `<comparison>/<variant>/<seed>`.
        variant: what it and its siblings of other seeds are called.
        seed: of the config.
        config: the values by key, "config.seed" for instance.
        data: the name of the data set that it was trained on.
        dataset: what that is called in tables.
        metrics: the lines of metrics.jsonl.
        seconds: of training, after each step; empty if unknown.
        summary: the content of summary.json; empty if the run is not finished.
        histograms: the lines of histograms.jsonl; empty if they were not read.
        problems: what is damaged or missing, in words.
    """

    folder: Path
    variant: str
    seed: int
    config: dict[str, Any]
    data: str
    dataset: str
    metrics: list[dict[str, Any]]
    seconds: dict[int, float]
    summary: dict[str, Any]
    histograms: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    problems: tuple[str, ...] = ()

    @functools.cached_property
    def train(self) -> Curve:
        """The batch of each training step."""
        return self._curve("train")

    @functools.cached_property
    def test(self) -> Curve:
        """The test images at each evaluation."""
        return self._curve("test")

    @functools.cached_property
    def gaps(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl about training images under stored and own statistics."""
        return [line for line in self.metrics if line["split"] == "gap"]

    def _curve(self, split: str) -> Curve:
        lines = [line for line in self.metrics if line["split"] == split]
        return Curve(
            np.array([line["step"] for line in lines], int),
            np.array([np.nan if line["loss"] is None else line["loss"] for line in lines], float),
            np.array([line["accuracy"] for line in lines], float),
        )

    @property
    def target_loss(self) -> float:
        """The training loss that the run was to reach."""
        return float(self.config["config.train.target_loss"])


def value(run: Run, quantity: str, at: str | float | int) -> float | None:
    """Returns one of `VALUES`; None if that step is missing or its loss was not finite."""
    split, key = quantity.split("_")
    curve: Curve = getattr(run, split)
    values: np.ndarray = getattr(curve, key)
    if at == "best":
        values = np.sort(values[~np.isnan(values)])
        at = "first" if key == "loss" else "last"
    elif at not in POINTS:
        values = values[curve.step == at]
    found = values[0 if at == "first" else -1] if len(values) else np.nan
    return None if np.isnan(found) else float(found)


def time(run: Run, quantity: str, goal: float) -> tuple[float, bool]:
    """Returns one of `TIMES`, and True; or how long the run went on without it, and False.

    Raises:
        UserError: if seconds are asked for and not known.
    """
    unit, _, key = quantity.split("_")
    if key == "loss":
        step = first_at_or_below(run.metrics, goal)
    else:
        reached = run.test.step[run.test.accuracy >= goal]
        step = int(reached[0]) if len(reached) else None
    end = step or int(run.train.step[-1])
    if unit == "steps":
        return end, step is not None
    if end not in run.seconds:
        raise UserError(
            f"{run.folder / 'timing.jsonl'} is damaged: it has no seconds of step {end}. "
            "Remove that run's folder, and the same command trains it anew."
        )
    return max(run.seconds[end], 0.001), step is not None  # the resolution of the file


def times(runs: Sequence[Run], quantity: str, goal: float) -> Times:
    """Returns one of `TIMES` of several runs."""
    found = [time(run, quantity, goal) for run in runs]
    return Times(tuple(taken for taken, _ in found), tuple(reached for _, reached in found))


def finished_runs(folder: Path, comparison: dict[str, Any]) -> list[Run]:
    """Returns the finished runs of a comparison, variants and seeds in their order.

    Raises:
        UserError: if the files of one are damaged or do not agree.
    """
    found = []
    for member in listed(folder, comparison):
        if not (member / "summary.json").exists():
            continue
        try:
            run = read_run(member, member.parent.name)
            trouble = "" if run.summary else run.problems[0]
        except UserError as error:
            trouble = str(error)
        if trouble or str(run.seed) != member.name or not len(run.test.step):
            trouble = trouble or f"its files are not of one finished run of seed {member.name}."
            raise UserError(
                f"the run in {member} is damaged: {trouble} Restore it from a copy, or remove that "
                "folder, and the same command trains it anew."
            )
        found.append(run)
    return found


def listed(folder: Path, comparison: dict[str, Any]) -> list[Path]:
    """Returns the folders of a comparison's runs, whether they are there or not."""
    variants, seeds = comparison.get("variants"), comparison.get("seeds")
    names = [str(name) for name in variants] if isinstance(variants, dict | list) else []
    return [
        folder / name / str(seed)
        for name in names
        for seed in (seeds if isinstance(seeds, list) else [])
    ]


def members(folder: Path, comparison: dict[str, Any]) -> tuple[list[Path], list[str]]:
    """Returns the run folders that a comparison has, and the names of those not there yet."""
    wanted = listed(folder, comparison)
    others = {file.parent for file in folder.glob("*/*/config.json")} - set(wanted)
    there = [member for member in wanted if (member / "config.json").exists()]
    missing = [f"{run.parent.name}/{run.name}" for run in wanted if run not in there]
    return there + sorted(others), missing


def read_run(folder: Path, variant: str = "") -> Run:
    """Returns what lies in a run's folder, without its histograms; `problems` says what is wrong.

    Raises:
        UserError: if there is no run, it has no step yet, or config or metrics are damaged.
    """
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"there is no run in {folder}: it has no config.json.")
    content = read_object(file)
    try:
        config = parsing.flat({"config": parsing.from_dict(content["config"]).to_dict()})
        data, dataset = str(content["data"]["name"]), str(content["data"]["label"])
    except (KeyError, ValueError, ArithmeticError, TypeError, AttributeError, UserError) as error:
        found = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{file} is damaged, or from another version of bnjax ({found})."
        ) from error
    metrics = read_metrics(folder / "metrics.jsonl")
    steps = [line["step"] for line in metrics if line["split"] == "train"]
    if not steps:
        raise UserError(f"the run in {folder} has no training step yet.")
    problems, summary, seconds = [], {}, {}
    if not (folder / "summary.json").exists():
        problems.append(f"{folder} is not finished: what it had after {steps[-1]} steps is shown.")
    else:
        try:
            summary = _summary(folder / "summary.json", steps[-1])
        except UserError as error:
            problems.append(str(error))
    file = folder / "timing.jsonl"
    try:
        timing = {line["step"]: line["seconds"] for line in read_lines(file)}
        seconds = {step: float(timing[step]) for step in steps}
        if not all(map(math.isfinite, seconds.values())):
            raise ValueError
    except (UserError, KeyError, TypeError, ValueError):
        problems.append(f"{file} is damaged or not complete: times are not shown.")
    seed = config["config.seed"]
    return Run(
        folder, variant, seed, config, data, dataset, metrics, seconds, summary, [], tuple(problems)
    )


def with_histograms(run: Run) -> Run:
    """Returns a run with the lines of its histograms.jsonl, or with the problem that they have."""
    file = run.folder / "histograms.jsonl"
    try:
        lines = read_lines(file)
        _check_histograms(lines)
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        problem = f"{file} is damaged: histograms are not shown."
        return dataclasses.replace(run, problems=(*run.problems, problem))
    return dataclasses.replace(run, histograms=lines)


def read_object(file: Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Raises:
        UserError: if it holds none.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no object.")
    return content


def _summary(file: Path, last: int) -> dict[str, Any]:
    summary = read_object(file)
    if summary.get("steps") != last:
        raise UserError(
            f"{file} is of {summary.get('steps')} steps, and metrics.jsonl ends at step {last}: "
            "one of them is damaged."
        )
    versions = summary.get("versions")
    if not isinstance(versions, dict) or type(summary.get("batch_size")) is not int:
        raise UserError(f"{file} is damaged: it lacks versions or batch_size.")
    return summary


def _check_histograms(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        for kind in line.keys() - {"step"}:
            for numbers in line[kind].values():
                quantiles, counts = numbers["quantiles"], numbers["counts"]
                values = np.array([numbers["low"], numbers["high"], *quantiles, *counts], float)
                if len(quantiles) != 9 or not counts or not np.isfinite(values).all():
                    raise ValueError(f"a histogram of step {line['step']} is not one")


# Two runs that differ in nothing else are of the same variant.
NO_VARIANT = ("config.seed", "config.name", "config.data.dir")


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything that one report is about.

    Attributes:
        runs: those that could be read, variants in their order and seeds in theirs.
        problems: what could not be read, or is not complete, in words.
        comparisons: the content of comparison.json in each folder of a comparison.
    """

    runs: list[Run]
    problems: list[str]
    comparisons: dict[Path, dict[str, Any]]

    @property
    def variants(self) -> dict[str, list[Run]]:
        """The runs of each variant."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.variant, []).append(run)
        return found


def read_study(folders: list[Path]) -> Study:
    """Returns what lies in the folders of runs and comparisons; what is damaged is told.

    Raises:
        UserError: if there is no readable run at all.
    """
    found: list[Run] = []
    problems: list[str] = []
    comparisons: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        named = {folder: ""}
        if (folder / COMPARISON).exists():
            try:
                comparisons[folder] = read_object(folder / COMPARISON)
            except UserError as error:
                problems.append(str(error))
                comparisons[folder] = {}
            there, missing = members(folder, comparisons[folder])
            named = {member: member.parent.name for member in there}
            if missing or not named:
                names = ", ".join(missing) or "any run"
                problems.append(f"the comparison {folder} has not begun {names}.")
        for member, variant in named.items():
            try:
                run = with_histograms(read_run(member, variant))
            except UserError as error:
                problems.append(str(error))
            else:
                found.append(run)
                problems.extend(run.problems)
    if not found:
        raise UserError(
            f"there is no run to report. {' '.join(problems)} "
            "Train one with bnjax train --config bn."
        )
    found = _once(_named(found), problems)
    order = list(dict.fromkeys(run.variant for run in found))
    return Study(sorted(found, key=lambda run: order.index(run.variant)), problems, comparisons)


def command(run: Run) -> list[str]:
    """Returns the words of a command that trains a run again, from the defaults."""
    config, standard = dict(run.config), parsing.flat({"config": default_config().to_dict()})
    if run.data == config["config.data.fallback"] != config["config.data.name"]:
        # The command adds the name of the set that stands in.
        config["config.name"] = config["config.name"].removesuffix(f"-{run.data}")
    words = [f"--{key}={value}" for key, value in config.items() if value != standard.get(key)]
    return ["python", "-m", "bnjax.main", "--config", "bnjax/train/config.py", *words]


def _named(found: list[Run]) -> list[Run]:
    """Names the variants by their config; where one name stands for several, also by a folder."""
    first: dict[str, dict[str, Path]] = {}
    for run in found:
        folder = run.folder.parent.parent if run.variant else run.folder  # of the comparison
        first.setdefault(run.config["config.name"], {}).setdefault(_identity(run), folder)

    def name(run: Run) -> str:
        plain = run.config["config.name"]
        folders = first[plain]
        more = f" ({folders[_identity(run)]})" if len(folders) > 1 else ""
        return f"{plain or 'run'}{more}"

    return [dataclasses.replace(run, variant=name(run)) for run in found]


def _once(found: list[Run], problems: list[str]) -> list[Run]:
    """Leaves out, and says so, runs of a config and seed that would count twice as evidence."""
    first: dict[tuple[str, int], Run] = {}
    for run in found:
        other = first.setdefault((run.variant, run.seed), run)
        if other is not run:
            problems.append(
                f"{run.folder} is of the same config and seed as {other.folder}, which is shown."
            )
    return list(first.values())


def _identity(run: Run) -> str:
    """Returns what the seeds of a variant have in common."""
    config = {key: value for key, value in run.config.items() if key not in NO_VARIANT}
    return json.dumps(config, sort_keys=True)
