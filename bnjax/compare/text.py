"""The results of a comparison as lines of text."""

from collections.abc import Sequence
from typing import Any

from bnjax.compare import claims, intervals, runs
from bnjax.compare.runs import Run


def of_comparison(comparison: dict[str, Any], finished: Sequence[Run]) -> str:
    """Returns the results as lines of text: each variant with its intervals, then each verdict."""
    title, total = comparison["question"] or "Comparison", len(comparison["seeds"])
    lines = [f"\n{title} (seeds: {total}; 95 % intervals in brackets)"]
    for name, variant in comparison["variants"].items():
        mine = [run for run in finished if run.variant == name]
        head = f"{name} on {variant['dataset']}: {len(mine)} of {total} runs finished"
        target = variant["config"]["train"]["target_loss"]
        lines += ["", head, *(f"  {line}" for line in _of_variant(mine, target))]
    verdicts = of_verdicts(comparison, finished)
    return "\n".join([*lines, "", *(verdicts or _differences(comparison, finished))])


def _of_variant(mine: Sequence[Run], target: float) -> list[str]:
    if not mine:
        return []
    last, best = (intervals.mean([*_accuracies(mine, at).values()]) for at in ("last", "best"))
    times = runs.times(mine, "steps_to_loss", target)
    reached = f"{sum(times.reached)} of {len(mine)} runs got there in {max(times.values):g} steps"
    taken = [one.seconds[int(one.train.step[-1])] for one in mine if one.seconds]
    seconds = f", in {intervals.mean(taken)} s of training a run" if taken else ""
    return [
        f"test accuracy {last} at the end, {best} at its best{seconds}",
        f"steps to training loss {target:g}: median {intervals.median(times)}; {reached}",
    ]


def of_verdicts(comparison: dict[str, Any], finished: Sequence[Run]) -> list[str]:
    """Returns the verdict of each statement as lines of text, and last the methods."""
    lines: list[str] = []
    methods: set[str] = set()
    for verdict in claims.verdicts(comparison, finished):
        statement, effect = verdict.statement, verdict.effect
        lines += [f"{verdict.outcome.upper()}: {statement}", f"  because {verdict.reason}"]
        if effect and verdict.of and verdict.against:
            alone = f"{statement.of} {verdict.of}, {statement.against} {verdict.against}"
            lines.append(f"  found {effect} in {effect.n} pairs of runs; alone: {alone}")
            methods |= {effect.method, verdict.of.method, verdict.against.method}
        if verdict.logrank is not None:
            p = f"{verdict.logrank:.2g}"
            lines.append(f"  some runs did not get there; log-rank test of the two: p = {p}")
        lines.append(f"  claimed by: {statement.source}")
    return [*lines, f"Methods: {'; '.join(sorted(methods))}."] if methods else lines


def _differences(comparison: dict[str, Any], finished: Sequence[Run]) -> list[str]:
    """Compares each variant with the first one, seed by seed, where nothing was claimed."""
    finals = {
        name: _accuracies([run for run in finished if run.variant == name], "last")
        for name in comparison["variants"]
    }
    first, *others = finals
    lines, methods = [], set()
    for name in others:
        if seeds := sorted({*finals[name]} & {*finals[first]}):
            pairs = ([finals[arm][seed] for seed in seeds] for arm in (name, first))
            effect = intervals.difference(*pairs)
            lines.append(
                f"test accuracy at the end, {name} - {first}: {effect} in {effect.n} pairs of runs"
            )
            methods.add(effect.method)
    return [*lines, f"Method: {'; '.join(sorted(methods))}."] if lines else []


def _accuracies(finished: Sequence[Run], at: str) -> dict[int, float]:
    """Returns the test accuracy of each run by its seed."""
    found = ((run.seed, runs.value(run, "test_accuracy", at)) for run in finished)
    return {seed: accuracy for seed, accuracy in found if accuracy is not None}
