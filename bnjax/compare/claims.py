"""Reads claims that were stated before the runs, and judges them. Does not import JAX."""

import dataclasses
import math
import runpy
from collections.abc import Callable, Sequence
from typing import Any

from bnjax.compare import intervals, runs
from bnjax.compare.intervals import Estimate
from bnjax.compare.runs import POINTS, TIMES, VALUES, Run
from bnjax.errors import UserError
from bnjax.train import parsing

DIRECTIONS = ("greater", "less", "equal")


@dataclasses.dataclass(frozen=True)
class Statement:
    """A claim that compares one quantity of two variants.

    Values are compared by their difference, `of - against`. Times are compared by their ratio,
    `of / against`, on the log scale.

    Attributes:
        quantity: one of `VALUES` (a loss or accuracy, on training batches or evaluated images) or
            of `TIMES` (the time until a loss or accuracy is reached).
        at: for a value, "first", "last", "best" or a step; for a time, the loss or accuracy to
            reach.
        of, against: the names of the variants.
        direction: "greater": the difference or ratio is above `margin`; "less": the difference is
            below -margin, or the ratio is below 1 / margin; "equal": it is within the margin. The
            difference or ratio is taken relative to `expected`.
        margin: for a value, a difference of 0 or more; for a time, a factor of 1 or more.
        source: the source of the claim, with its figures.
        expected: the claimed difference or ratio; None means no difference, or a ratio of
            1.

    Raises:
        ValueError: if a field is invalid.
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
        points = "a number" if self.is_time else f"{', '.join(POINTS)} or a step"
        is_point = self.at in POINTS and not self.is_time
        checks = {
            f"quantity: {', '.join([*VALUES, *TIMES])}": self.quantity in (*VALUES, *TIMES),
            f"at: {points}": is_point or (_is_number(self.at) and float(self.at) > 0),
            f"direction: {', '.join(DIRECTIONS)}": self.direction in DIRECTIONS,
            f"margin: {self.neutral} or above": _is_number(self.margin)
            and self.margin >= self.neutral,
            "expected: a number, above 0 for a ratio": _is_number(self.about)
            and (self.about > 0 or not self.is_time),
            "source: a text": isinstance(self.source, str) and self.source != "",
        }
        if wrong := [allowed for allowed, holds in checks.items() if not holds]:
            raise ValueError(
                f"{dataclasses.asdict(self)} is invalid. Allowed for {'; for '.join(wrong)}"
            )

    @property
    def is_time(self) -> bool:
        """Whether the quantity is a time; the ratio of times is then compared."""
        return self.quantity in TIMES

    @property
    def neutral(self) -> int:
        """The difference (0) or ratio (1) between two equal variants."""
        return 1 if self.is_time else 0

    @property
    def about(self) -> float:
        """The expected difference or ratio, to which the margin is relative."""
        return self.neutral if self.expected is None else self.expected

    def __str__(self) -> str:
        """Returns the statement in words.

        >>> print(Statement("steps_to_loss", 0.2, "no_bn", "bn", "equal", 1.25, "me", expected=5))
        steps to loss 0.2: no_bn / bn is 5 within a factor of 1.25
        >>> print(Statement("test_accuracy", "last", "bn", "no_bn", "less", 0.02, "a paper"))
        test accuracy (last): bn - no_bn is less than -0.02
        """
        words, about, margin = self.quantity.replace("_", " "), self.about, self.margin
        if self.is_time:
            words, compared = f"{words} {self.at:g}", f"{self.of} / {self.against}"
            low, high, around = about / margin, about * margin, f"a factor of {margin:g}"
        else:
            point = self.at if self.at in POINTS else f"step {self.at}"
            words, compared = f"{words} ({point})", f"{self.of} - {self.against}"
            low, high, around = about - margin, about + margin, f"{margin:g} either way"
        if self.direction == "equal":
            return f"{words}: {compared} is {about:g} within {around}"
        bound = low if self.direction == "less" else high
        return f"{words}: {compared} is {self.direction} than {bound:g}"


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The verdict on a statement.

    Attributes:
        statement: the claim.
        outcome: "reproduced", "not reproduced" or "inconclusive".
        reason: the reason for the outcome, in words.
        effect: the difference or ratio with its 95 % interval; None without pairs of runs.
        of, against: the mean value, or Kaplan-Meier median time, of each variant; None without
            pairs of runs.
        logrank: the p value of the log-rank test; None if all runs reached the goal.
    """

    statement: Statement
    outcome: str
    reason: str
    effect: Estimate | None = None
    of: Estimate | None = None
    against: Estimate | None = None
    logrank: float | None = None

    def __str__(self) -> str:
        """Returns the outcome, claim, reason, figures and source as lines of text."""
        statement, effect = self.statement, self.effect
        lines = [f"{self.outcome.upper()}: {statement}", f"  because {self.reason}"]
        if effect:
            alone = f"{statement.of} {self.of}, {statement.against} {self.against}"
            lines.append(f"  found {effect} in {effect.n} pairs of runs; separately: {alone}")
        if self.logrank is not None:
            p = f"{self.logrank:.2g}"
            lines.append(f"  some runs did not reach the goal; log-rank test: p = {p}")
        return "\n".join([*lines, f"  claimed by: {statement.source}"])


@dataclasses.dataclass(frozen=True)
class Claim:
    """The content of a claim file, whose `get_claim` returns these fields as a dict.

    Attributes:
        question: the question in words.
        variants: {name: (config file, {key: value})}; the path of the
            file is relative to the claim's folder.
        statements: dicts with the fields of `Statement`.
        seeds: the required number of seeds, 2 or more.
        full: {key: value} for all variants in the full version.
        small: {key: value} for all variants in the small version, which is the default; None if
            there is no small version.
    """

    question: str
    variants: dict[str, tuple[str, dict[str, Any]]]
    statements: list[dict[str, Any]]
    seeds: int
    full: dict[str, Any]
    small: dict[str, Any] | None = None


def load(path: str) -> Claim:
    """Loads a claim file. Config paths become relative to the working directory.

    Raises:
        UserError: if the file cannot be run, or its content is invalid.
    """
    file = parsing.find(path, "claim")
    try:
        claim = Claim(**runpy.run_path(str(file))["get_claim"]())
        variants = {
            name: (str(file.parent / config), dict(overrides))
            for name, (config, overrides) in claim.variants.items()
        }
        if claim.seeds < 2 or not variants:
            raise ValueError("a claim needs at least one variant and two seeds")
        for statement in [Statement(**fields) for fields in claim.statements]:
            if unknown := {statement.of, statement.against} - {*variants}:
                raise ValueError(f"{statement} has unknown variants: {', '.join(sorted(unknown))}")
        small = claim.small if claim.small is None else dict(claim.small)
        return dataclasses.replace(claim, variants=variants, full=dict(claim.full), small=small)
    except (Exception, SystemExit) as error:
        found = f"{type(error).__name__}: {error}".rstrip(".")
        raise UserError(
            f"the claim file {path} cannot be used: {found}. bnjax/compare/claims.py describes the "
            "content of claim files."
        ) from error


def of_configs(files: Sequence[str]) -> Claim:
    """Returns a claim without statements that compares config files.

    Raises:
        UserError: if a config cannot be loaded, or two configs have the same name.
    """
    names = [parsing.load(file, []).name for file in files]
    if len({*names}) < len(files):
        raise UserError(
            f"two configs have the same name: {', '.join(names)}. Give each a unique config.name."
        )
    named: Any = {name: (file, {}) for name, file in zip(names, files, strict=True)}
    return Claim("", named, [], seeds=0, full={})


def verdicts(comparison: dict[str, Any], finished: Sequence[Run]) -> list[Verdict]:
    """Returns a verdict on each statement of a comparison, from its finished runs.

    Runs are compared at equal seeds. A statement is reproduced if the 95 % interval of the
    difference or ratio lies completely within the claimed range, and not reproduced if the interval
    lies completely outside. Otherwise the statement is inconclusive. It is also inconclusive if
    runs are unfinished or there are too few seeds. There is no correction for multiple comparisons:
    one of twenty intervals is expected to miss the true value.
    """
    statements = [Statement(**fields) for fields in comparison["statements"]]
    return [_verdict(statement, comparison, finished) for statement in statements]


def effects(comparison: dict[str, Any], finished: Sequence[Run]) -> dict[str, Estimate]:
    """Returns the difference in final test accuracy between each later variant and the first.

    The keys are "later - first". Only seeds that have finished runs of both variants count.
    """
    finals = {
        name: {run.seed: run.curve("test").accuracy[-1] for run in finished if run.variant == name}
        for name in comparison["variants"]
    }
    (first, reference), *others = finals.items()
    found = {}
    for name, accuracies in others:
        if shared := sorted(accuracies.keys() & reference.keys()):
            pairs = ([float(arm[seed]) for seed in shared] for arm in (accuracies, reference))
            found[f"{name} - {first}"] = intervals.difference(*pairs)
    return found


def as_text(found: Sequence[Verdict]) -> str:
    """Returns verdicts as lines of text, followed by the statistical methods."""
    estimates = [one for verdict in found for one in (verdict.effect, verdict.of, verdict.against)]
    methods = sorted({one.method for one in estimates if one})
    return "\n".join([*map(str, found), *([f"Methods: {'; '.join(methods)}."] if methods else [])])


def _verdict(statement: Statement, comparison: dict[str, Any], finished: Sequence[Run]) -> Verdict:
    names, seeds = (statement.of, statement.against), comparison["seeds"]
    arms = [{run.seed: run for run in finished if run.variant == name} for name in names]
    both = zip(names, arms, strict=True)
    missing = [f"{name}/{seed}" for name, arm in both for seed in seeds if seed not in arm]
    seeds = [seed for seed in seeds if all(seed in arm for arm in arms)]
    pairs, logrank = [[arm[seed] for seed in seeds] for arm in arms], None
    problems = [f"unfinished: {', '.join(missing)}"] if missing else []
    if len(seeds) < comparison["seeds_needed"]:
        problems.append(
            f"only {len(seeds)} of the {comparison['seeds_needed']} required seeds are finished"
        )
    if not seeds:
        return Verdict(statement, "inconclusive", "; ".join(problems))
    if statement.is_time:
        of, against = (runs.times(pair, statement.quantity, float(statement.at)) for pair in pairs)
        effect, alone = intervals.ratio(of, against), [*map(intervals.median, (of, against))]
        if not all((*of.reached, *against.reached)):
            logrank = intervals.logrank(of, against)
    else:
        found = [[runs.value(run, statement.quantity, statement.at) for run in p] for p in pairs]
        known = [[x for x in arm if x is not None] for arm in found]
        if known != found:
            problems.append("some runs have no finite value at this point")
            return Verdict(statement, "inconclusive", "; ".join(problems))
        of_accuracies = statement.quantity.endswith("accuracy")
        mean = intervals.mean_accuracy if of_accuracies else intervals.mean
        effect, alone = intervals.difference(*known), [*map(mean, known)]
    outcome, reason = decide(statement, effect)
    if problems:
        outcome, reason = "inconclusive", "; ".join(problems)
    return Verdict(statement, outcome, reason, effect, alone[0], alone[1], logrank)


def decide(statement: Statement, effect: Estimate) -> tuple[str, str]:
    """Returns the outcome of a statement and its reason, given the difference or ratio."""
    scale: Callable[[float], float] = _log if statement.is_time else float
    shift, margin = scale(statement.about), scale(statement.margin)
    low, high = scale(effect.low) - shift, scale(effect.high) - shift
    holds, fails = {
        "greater": (low > margin, high <= margin),
        "less": (high < -margin, low >= -margin),
        "equal": (-margin <= low and high <= margin, low > margin or high < -margin),
    }[statement.direction]
    if holds:
        return "reproduced", "the 95 % interval lies completely within the claimed range"
    if fails:
        return "not reproduced", "the 95 % interval lies completely outside the claimed range"
    if effect.n < 2:
        return "inconclusive", "a single seed gives no interval"
    return "inconclusive", "the 95 % interval lies partly within the claimed range"


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf
