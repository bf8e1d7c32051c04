"""Run folders and comparison folders, read back from their files; no JAX."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.errors import UserError
from bnjax.train import parsing
from bnjax.train.config import default_config
from bnjax.train.records import read_lines, read_metrics

# Two runs that differ in nothing else are of the same variant.
NO_VARIANT = ("config.seed", "config.name", "config.data.dir")


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of one split: `step` int [n], `loss` and `accuracy` float [n], NaN for a loss that was not finite."""

    step: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Run:
    """One run, finished or not; in a comparison it lies in the folder of its variant, which lies in that of the comparison.

    Attributes:
        folder: where it lies.
        variant: what the report calls it and its siblings of other seeds.
        seed: of the config.
        config: the values by key, "config.seed" for instance.
        dataset: the label of its data.
        train, test: its curves.
        seconds: of training, after each step of `train`; empty if unknown.
        summary: the content of summary.json; empty if the run is not finished.
        histograms: the lines of histograms.jsonl.
    """

    folder: Path
    variant: str
    seed: int
    config: dict[str, Any]
    dataset: str
    train: Curve
    test: Curve
    seconds: np.ndarray
    summary: dict[str, Any]
    histograms: list[dict[str, Any]]

    @property
    def target_loss(self) -> float:
        """The training loss that the run was to reach."""
        return float(self.config["config.train.target_loss"])

    @property
    def steps_to_loss(self) -> int | None:
        """The step whose training loss was first at or below the target, None if there is none."""
        reached = self.train.step[self.train.loss <= self.target_loss]
        return int(reached[0]) if len(reached) else None

    @property
    def command(self) -> list[str]:
        """The words of a command that trains this run again, from the defaults."""
        standard = parsing.flat({"config": default_config().to_dict()})
        different = {key: value for key, value in self.config.items() if value != standard.get(key)}
        return [
            "python",
            "-m",
            "bnjax.main",
            "--config",
            "bnjax/train/config.py",
            *(f"--{key}={value}" for key, value in different.items()),
        ]


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
    """Returns what lies in run folders and comparison folders; what is damaged is told and the others are read.

    Raises:
        UserError: if there is no readable run at all.
    """
    runs: list[Run] = []
    problems: list[str] = []
    comparisons: dict[Path, dict[str, Any]] = {}
    for folder in folders:
        members = {folder: ""}
        if (folder / "comparison.json").exists():
            try:
                comparison = _json(folder / "comparison.json")
            except UserError as error:
                problems.append(str(error))
                comparison = {}
            comparisons[folder] = comparison
            found, missing = _members(folder, comparison)
            members = {member: member.parent.name for member in found}
            if missing or not members:
                problems.append(
                    f"the comparison {folder} has not begun {', '.join(missing) or 'any run'}."
                )
        for member, variant in members.items():
            try:
                run, told = read_run(member, variant)
            except UserError as error:
                problems.append(str(error))
            else:
                runs.append(run)
                problems.extend(told)
    if not runs:
        raise UserError(
            f"there is no run to report. {' '.join(problems)} Train one with python -m bnjax.main --config configs/bn.py."
        )
    runs = _once(_named(runs), problems)
    order = list(dict.fromkeys(run.variant for run in runs))
    return Study(sorted(runs, key=lambda run: order.index(run.variant)), problems, comparisons)


def read_run(folder: Path, variant: str = "") -> tuple[Run, list[str]]:
    """Returns a run, and what is wrong with it in words.

    Raises:
        UserError: if there is no run, or its config.json or metrics.jsonl is damaged or empty.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"there is no run in {folder}: it has no config.json.")
    try:
        content = _json(file)
        config = parsing.flat({"config": parsing.from_dict(content["config"]).to_dict()})
        dataset = str(content["data"]["label"])
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{file} is damaged, or from another version of bnjax ({type(error).__name__}: {error})."
        ) from error
    lines = read_metrics(folder / "metrics.jsonl")
    train, test = (
        _curve([line for line in lines if line["split"] == split]) for split in ("train", "test")
    )
    if not len(train.step):
        raise UserError(f"the run in {folder} has no training step yet.")
    problems = []
    summary: dict[str, Any] = {}
    seconds: list[Any] = []
    histograms: list[dict[str, Any]] = []
    try:
        if not (folder / "summary.json").exists():
            problems.append(
                f"{folder} is not finished: what it had after {train.step[-1]} steps is shown."
            )
        else:
            summary = _summary(folder / "summary.json", int(train.step[-1]))
    except UserError as error:
        problems.append(str(error))
    try:
        timing = {line["step"]: line["seconds"] for line in read_lines(folder / "timing.jsonl")}
        seconds = [float(timing[step]) for step in train.step.tolist()]
    except (UserError, KeyError, TypeError, ValueError):
        problems.append(
            f"{folder / 'timing.jsonl'} is damaged or not complete: times are not shown."
        )
    try:
        histograms = read_lines(folder / "histograms.jsonl")
        _check_histograms(histograms)
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        histograms = []
        problems.append(f"{folder / 'histograms.jsonl'} is damaged: histograms are not shown.")
    return Run(
        folder,
        variant,
        config["config.seed"],
        config,
        dataset,
        train,
        test,
        np.array(seconds, float),
        summary,
        histograms,
    ), problems


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}).") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged: it holds no object.")
    return content


def _summary(file: Path, last: int) -> dict[str, Any]:
    summary = _json(file)
    if summary.get("steps") != last:
        raise UserError(
            f"{file} is of {summary.get('steps')} steps, and metrics.jsonl ends at step {last}: one of them is damaged."
        )
    versions = summary.get("versions")
    if not isinstance(versions, dict) or type(summary.get("batch_size")) is not int:
        raise UserError(f"{file} is damaged: it lacks versions or batch_size.")
    return summary


def _curve(lines: list[dict[str, Any]]) -> Curve:
    losses = [np.nan if line["loss"] is None else line["loss"] for line in lines]
    return Curve(
        np.array([line["step"] for line in lines], int),
        np.array(losses, float),
        np.array([line["accuracy"] for line in lines]),
    )


def _check_histograms(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        for kind in line.keys() - {"step"}:
            for numbers in line[kind].values():
                values = [
                    numbers["low"],
                    numbers["high"],
                    *numbers["quantiles"],
                    *numbers["counts"],
                ]
                if (
                    len(numbers["quantiles"]) != 9
                    or not numbers["counts"]
                    or not np.isfinite(np.array(values, float)).all()
                ):
                    raise ValueError(
                        f"a histogram of step {line['step']} has not the numbers that it should have"
                    )


def _members(folder: Path, comparison: dict[str, Any]) -> tuple[list[Path], list[str]]:
    """Returns the run folders of a comparison, variants and seeds in their listed order, and the names of runs that are not there yet."""
    variants, seeds = comparison.get("variants"), comparison.get("seeds")
    names = [str(name) for name in variants] if isinstance(variants, dict | list) else []
    numbers = [str(seed) for seed in seeds] if isinstance(seeds, list) else []
    listed = [folder / name / seed for name in names for seed in numbers]
    others = {file.parent for file in folder.glob("*/*/config.json")} - set(listed)
    there = [member for member in listed if (member / "config.json").exists()]
    return there + sorted(others), [
        f"{member.parent.name}/{member.name}" for member in listed if member not in there
    ]


def _named(runs: list[Run]) -> list[Run]:
    """Names the variants: by their config; where one name stands for several configs, also by the folder of the run or comparison."""
    first: dict[str, dict[str, Path]] = {}
    for run in runs:
        of_comparison = bool(run.variant)
        folder = run.folder.parent.parent if of_comparison else run.folder
        first.setdefault(run.config["config.name"], {}).setdefault(_identity(run), folder)

    def name(run: Run) -> str:
        plain, folders = run.config["config.name"], first[run.config["config.name"]]
        return (
            (plain or "run")
            if len(folders) == 1
            else f"{plain or 'run'} ({folders[_identity(run)]})"
        )

    return [dataclasses.replace(run, variant=name(run)) for run in runs]


def _once(runs: list[Run], problems: list[str]) -> list[Run]:
    """Leaves out runs of a config and seed that are there already, which would count twice as evidence, and says so."""
    found: dict[tuple[str, int], Run] = {}
    for run in runs:
        first = found.setdefault((run.variant, run.seed), run)
        if first is not run:
            problems.append(
                f"{run.folder} is of the same config and seed as {first.folder}, which is shown."
            )
    return list(found.values())


def _identity(run: Run) -> str:
    """Returns what the seeds of a variant have in common."""
    return json.dumps(
        {key: value for key, value in run.config.items() if key not in NO_VARIANT}, sort_keys=True
    )
