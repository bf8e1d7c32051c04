"""Claims that are written down before the runs, and what the runs say of them. Nothing here needs JAX."""

import dataclasses
import json
import math
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnjax.compare import intervals, results
from bnjax.compare.intervals import Estimate
from bnjax.compare.results import POINTS, TIMES, VALUES
from bnjax.errors import UserError

DIRECTIONS = ("greater", "less", "equal")
FILE = "comparison.json"
# Config keys for a claim that is tried at a small budget: a tenth of the images in batches of a
# tenth, so that an epoch is still 10 steps, and a narrow network: half a million multiplications an
# image forward instead of 34 million.
SMALL = {
    "data.train_images": 5000,
    "model.filters": (8, 12, 16),
    "model.dense": (64, 32),
    "model.groups": 4,
    "train.batch_size": 500,
    "train.steps": 100,
}


@dataclasses.dataclass(frozen=True)
class Statement:
    """One thing that is claimed: how a quantity of one variant compares with another's.

    Values are compared by their difference, `of - against`; times by their ratio, `of / against`, on the log scale.

    Attributes:
        quantity: one of `VALUES` (loss and accuracy of a step's batch, or of all test images) or of `TIMES` (training loss of a step,
            accuracy on the test images).
        at: of a value "first", "last", "best" or a step; of a time what has to be reached.
        of, against: the names of the variants.
        direction: "greater": the difference is greater than `margin`, or the ratio than this factor; "less": less than minus the
            margin, or one over the factor; "equal": within the margin either way.
        margin: 0 or above; of a ratio 1 or above.
        source: who says so, where, with which figures.
        expected: what the comparison is about, if not about no difference (0, or a ratio of 1).

    Raises:
        ValueError: if one of these is not possible.
    """

    quantity: str
    at: str | float | int
    of: str
    against: str
    direction: str
    margin: float | int
    source: str
    expected: float | int | None = None

    def __post_init__(self) -> None:
        number = (
            isinstance(self.at, int | float)
            and not isinstance(self.at, bool)
            and 0 < self.at < math.inf
        )
        expected = self.neutral if self.expected is None else self.expected
        checks = {
            f"quantity: {', '.join([*VALUES, *TIMES])}": self.quantity in VALUES
            or self.quantity in TIMES,
            f"at: {'a number' if self.is_time else ', '.join(POINTS) + ' or a step'}": number
            or (not self.is_time and self.at in POINTS),
            f"direction: {', '.join(DIRECTIONS)}": self.direction in DIRECTIONS,
            f"margin: {self.neutral} or above": not isinstance(self.margin, bool)
            and self.neutral <= self.margin < math.inf,
            "expected: a number, of a ratio above 0": not isinstance(expected, bool)
            and -math.inf < expected < math.inf
            and (expected > 0 or not self.is_time),
            "source: who says so": type(self.source) is str and bool(self.source),
        }
        if wrong := [allowed for allowed, holds in checks.items() if not holds]:
            raise ValueError(
                f"{dataclasses.asdict(self)} is not possible; allowed is for {'; for '.join(wrong)}"
            )

    @property
    def is_time(self) -> bool:
        """Whether it is about a time, so that ratios are compared."""
        return self.quantity in TIMES

    @property
    def neutral(self) -> int:
        """What the comparison gives for two variants that are alike."""
        return 1 if self.is_time else 0

    def __str__(self) -> str:
        """Returns the statement in words.

        >>> print(Statement("steps_to_loss", 0.2, "no_bn", "bn", "equal", 1.25, "the tutorial", expected=5))
        steps to loss 0.2: no_bn / bn is 5 within a factor of 1.25
        >>> print(Statement("test_accuracy", "last", "bn", "no_bn", "less", 0.02, "a paper"))
        test accuracy (last): bn - no_bn is less than -0.02
        """
        words, expected = (
            self.quantity.replace("_", " "),
            self.neutral if self.expected is None else self.expected,
        )
        if self.is_time:
            words, compared = f"{words} {self.at:g}", f"{self.of} / {self.against}"
            bounds, around = (
                (expected * self.margin, expected / self.margin),
                f"a factor of {self.margin:g}",
            )
        else:
            point = self.at if self.at in POINTS else f"step {self.at}"
            words, compared = f"{words} ({point})", f"{self.of} - {self.against}"
            bounds, around = (
                (expected + self.margin, expected - self.margin),
                f"{self.margin:g} either way",
            )
        if self.direction == "equal":
            return f"{words}: {compared} is {expected:g} within {around}"
        return f"{words}: {compared} is {self.direction} than {bounds[self.direction == 'less']:g}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say of a statement.

    Attributes:
        statement: what was claimed.
        outcome: "reproduced", "not reproduced" or "inconclusive".
        reason: why, in words.
        effect: the difference or ratio with its 95 % interval; None if there is no pair of runs.
        of, against: the variants on their own: mean, or Kaplan-Meier median of times; None likewise.
        logrank: p value of the log-rank test, where some runs did not get there; None elsewhere.
    """

    statement: Statement
    outcome: str
    reason: str
    effect: Estimate | None = None
    of: Estimate | None = None
    against: Estimate | None = None
    logrank: float | None = None


def load(path: str) -> dict[str, Any]:
    """Returns the claim of a file, as its `get_claim` gives it, checked.

    `question` (text); `variants` {name: (config file, as seen from the claim's folder, {key: value})}; `statements`, dicts with the fields
    of `Statement`; `seeds`, how many it takes; `full` and, if there is a small version that is run by default, `small`: {key: value}.

    Raises:
        UserError: if the file cannot be run or something in it is missing or impossible.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(
            f"there is no claim file {path}. The examples are in the folder configs/claims of the repository."
        )
    try:
        claim = runpy.run_path(str(file))["get_claim"]()
        keys = {"question", "variants", "statements", "seeds", "full"}
        if set(claim) - {"small"} != keys:
            raise ValueError(
                f"its keys are {', '.join(claim)} and should be {', '.join(sorted(keys))} and perhaps small"
            )
        for name, kind in {
            "question": str,
            "variants": dict,
            "statements": list,
            "full": dict,
            "small": dict,
        }.items():
            if name in claim and not isinstance(claim[name], kind):
                raise ValueError(
                    f"{name} = {claim[name]!r} is not possible; it has to be a {kind.__name__}"
                )
        if not claim["variants"]:
            raise ValueError("it has no variants")
        if type(claim["seeds"]) is not int or claim["seeds"] < 2:
            raise ValueError(f"seeds = {claim['seeds']!r} is not possible; allowed are 2 and above")
        for name in claim["variants"]:
            check_name(name)
        _statements(claim)
        variants = {
            name: (str(file.parent / config), dict(overrides))
            for name, (config, overrides) in claim["variants"].items()
        }
        return {**claim, "variants": variants}
    except (Exception, SystemExit) as error:
        found = f"{type(error).__name__}: {error}".rstrip(".")
        raise UserError(
            f"the claim file {path} does not work: {found}. bnjax/claims.py says what it has to hold."
        ) from error


def _statements(claim: dict[str, Any]) -> list[Statement]:
    statements = [Statement(**fields) for fields in claim["statements"]]
    for statement in statements:
        if unknown := {statement.of, statement.against} - set(claim["variants"]):
            raise ValueError(f"{statement} names no variant: {', '.join(sorted(unknown))}")
    return statements


def check_name(name: str) -> None:
    """Checks that a variant's name can be a folder's.

    Raises:
        UserError: if not.
    """
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(
            f"a variant cannot be called {name!r}: its runs get a folder of that name. Use letters, digits, _ . + -."
        )


def read(folder: Path) -> dict[str, Any]:
    """Returns the comparison that a folder holds, as `bnjax.compare.grid` wrote it.

    Raises:
        UserError: if there is none or it is damaged.
    """
    try:
        found = json.loads((folder / FILE).read_bytes())
        for name, variant in found["variants"].items():
            check_name(name)
            (
                float(variant["config"]["train"]["target_loss"]),
                {**variant["differs"]},
                variant["dataset"],
            )
        _statements(found)
        seeds = [int(seed) for seed in found["seeds"]]
        texts = {key: str(found[key]) for key in ("question", "size", "command")}
        return {**found, **texts, "seeds": seeds, "seeds_needed": int(found["seeds_needed"])}
    except (
        OSError,
        ValueError,
        ArithmeticError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        UserError,
    ) as error:
        raise UserError(
            f"{folder / FILE} is missing or damaged ({type(error).__name__}: {error})."
        ) from error


def verdicts(comparison: dict[str, Any], runs: list[dict[str, Any]]) -> list[Verdict]:
    """Returns a verdict for each statement of a comparison (comparison.json), from its runs (`bnjax.compare.results.read_runs`).

    Runs are compared at equal seeds. A statement is reproduced if the 95 % interval of the difference, or of the ratio, lies wholly within
    what is claimed; not reproduced if it lies wholly outside; inconclusive otherwise, and always with fewer seeds than the claim asks for
    or with unfinished runs. Each statement is judged for itself: of twenty intervals one is expected to miss the truth.
    """
    return [_verdict(statement, comparison, runs) for statement in _statements(comparison)]


def _verdict(
    statement: Statement, comparison: dict[str, Any], runs: list[dict[str, Any]]
) -> Verdict:
    arms = [
        {run["seed"]: run for run in runs if run["variant"] == name}
        for name in (statement.of, statement.against)
    ]
    missing = [
        f"{run['variant']}/{run['seed']}"
        for arm in arms
        for run in arm.values()
        if run["summary"] is None
    ]
    seeds = [
        seed
        for seed in comparison["seeds"]
        if all(arm[seed]["summary"] is not None for arm in arms)
    ]
    pairs, logrank = [[arm[seed] for seed in seeds] for arm in arms], None
    problems = [f"unfinished: {', '.join(missing)}"] if missing else []
    if len(seeds) < comparison["seeds_needed"]:
        problems.append(
            f"{len(seeds)} of the {comparison['seeds_needed']} seeds that the claim asks for"
        )
    if not seeds:
        return Verdict(statement, "inconclusive", "; ".join(problems))
    if statement.is_time:
        both = [results.times(pair, statement.quantity, float(statement.at)) for pair in pairs]
        effect, alone = intervals.ratio(*both), [intervals.median(arm) for arm in both]
        if not all((*both[0].reached, *both[1].reached)):
            logrank = intervals.logrank(*both)
    else:
        found = [
            [results.value(run, statement.quantity, statement.at) for run in pair] for pair in pairs
        ]
        known = [[float(x) for x in arm if x is not None] for arm in found]
        if any(x is None for arm in found for x in arm):
            return Verdict(
                statement,
                "inconclusive",
                "; ".join([*problems, "some runs have no finite value at that point"]),
            )
        effect, alone = intervals.difference(*known), [intervals.mean(arm) for arm in known]
    outcome, reason = decide(statement, effect)
    if problems:
        outcome, reason = "inconclusive", "; ".join(problems)
    return Verdict(statement, outcome, reason, effect, alone[0], alone[1], logrank)


def decide(statement: Statement, effect: Estimate) -> tuple[str, str]:
    """Returns the outcome of a statement for this difference or ratio, and the reason."""
    scale: Callable[[float | int], float] = _log if statement.is_time else float
    shift = scale(statement.neutral if statement.expected is None else statement.expected)
    low, high, margin = (
        scale(effect.low) - shift,
        scale(effect.high) - shift,
        scale(statement.margin),
    )
    holds, fails = {
        "greater": (low > margin, high <= margin),
        "less": (high < -margin, low >= -margin),
        "equal": (-margin <= low and high <= margin, low > margin or high < -margin),
    }[statement.direction]
    if holds:
        return "reproduced", "the 95 % interval lies wholly within what is claimed"
    if fails:
        return "not reproduced", "the 95 % interval lies wholly outside what is claimed"
    return (
        "inconclusive",
        "one seed has no interval"
        if effect.n < 2
        else "the 95 % interval lies partly within what is claimed",
    )


def _log(x: float | int) -> float:
    return math.log(x) if x > 0 else -math.inf
