"""What one report is about: runs, and the names of their variants."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from bnjax.compare import runs
from bnjax.compare.runs import Run
from bnjax.errors import UserError
from bnjax.train import parsing
from bnjax.train.config import default_config

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
        members = {folder: ""}
        if (folder / runs.COMPARISON).exists():
            try:
                comparisons[folder] = runs.read_object(folder / runs.COMPARISON)
            except UserError as error:
                problems.append(str(error))
                comparisons[folder] = {}
            there, missing = runs.members(folder, comparisons[folder])
            members = {member: member.parent.name for member in there}
            if missing or not members:
                names = ", ".join(missing) or "any run"
                problems.append(f"the comparison {folder} has not begun {names}.")
        for member, variant in members.items():
            try:
                run = runs.with_histograms(runs.read_run(member, variant))
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
