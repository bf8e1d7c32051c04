"""The results of a comparison as lines of text."""

from typing import Any

from bnjax.compare import claims, intervals, results


def of_comparison(comparison: dict[str, Any], runs: list[dict[str, Any]]) -> str:
    """Returns the results as lines of text: each variant with its intervals, then each verdict."""
    lines = [
        f"\n{comparison['question'] or 'Comparison'} (seeds: {len(comparison['seeds'])}; 95 % intervals in brackets)"
    ]
    for name, variant in comparison["variants"].items():
        finished = [run for run in runs if run["variant"] == name and run["summary"] is not None]
        lines += [
            "",
            f"{name} on {variant['dataset']}: {len(finished)} of {len(comparison['seeds'])} runs finished",
        ]
        lines += [
            f"  {line}" for line in _of_variant(finished, variant["config"]["train"]["target_loss"])
        ]
    verdicts = _verdicts(comparison, runs)
    return "\n".join([*lines, "", *(verdicts or _differences(comparison, runs))])


def _of_variant(runs: list[dict[str, Any]], target: float) -> list[str]:
    if not runs:
        return []
    accuracy = {at: intervals.mean([*_accuracies(runs, at).values()]) for at in ("last", "best")}
    times = results.times(runs, "steps_to_loss", target)
    reached = f"{sum(times.reached)} of {len(runs)} runs got there in {max(times.values):g} steps"
    return [
        f"test accuracy {accuracy['last']} at the end, {accuracy['best']} at its best",
        f"steps to training loss {target:g}: median {intervals.median(times)}; {reached}",
    ]


def _verdicts(comparison: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    methods: set[str] = set()
    for verdict in claims.verdicts(comparison, runs):
        lines += [f"{verdict.outcome.upper()}: {verdict.statement}", f"  because {verdict.reason}"]
        if verdict.effect and verdict.of and verdict.against:
            names = f"{verdict.statement.of} {verdict.of}, {verdict.statement.against} {verdict.against}"
            lines.append(
                f"  found {verdict.effect} in {verdict.effect.n} pairs of runs; alone: {names}"
            )
            methods |= {verdict.effect.method, verdict.of.method, verdict.against.method}
        if verdict.logrank is not None:
            lines.append(
                f"  some runs did not get there; log-rank test of the two: p = {verdict.logrank:.2g}"
            )
        lines.append(f"  claimed by: {verdict.statement.source}")
    return [*lines, f"Methods: {'; '.join(sorted(methods))}."] if methods else lines


def _differences(comparison: dict[str, Any], runs: list[dict[str, Any]]) -> list[str]:
    """Compares each variant with the first one, seed by seed, where nothing was claimed."""
    done = [run for run in runs if run["summary"] is not None]
    finals = {
        name: _accuracies([run for run in done if run["variant"] == name], "last")
        for name in comparison["variants"]
    }
    first, *others = finals
    lines, methods = [], set()
    for name in others:
        if seeds := sorted({*finals[name]} & {*finals[first]}):
            effect = intervals.difference(
                *([finals[arm][seed] for seed in seeds] for arm in (name, first))
            )
            lines.append(
                f"test accuracy at the end, {name} - {first}: {effect} in {effect.n} pairs of runs"
            )
            methods.add(effect.method)
    return [*lines, f"Method: {'; '.join(sorted(methods))}."] if lines else []


def _accuracies(runs: list[dict[str, Any]], at: str) -> dict[int, float]:
    """Returns the test accuracy of each run by its seed."""
    found = ((run["seed"], results.value(run, "test_accuracy", at)) for run in runs)
    return {seed: accuracy for seed, accuracy in found if accuracy is not None}
