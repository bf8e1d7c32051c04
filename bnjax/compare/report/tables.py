"""The numbers of a report, in words and tables."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnjax.compare import claims, intervals, runs
from bnjax.compare.report.study import Study, command
from bnjax.compare.runs import Run
from bnjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, with a caption that says how it was made."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


def verdict_table(study: Study) -> Table | None:
    """Returns the verdict on each statement of the comparisons, None if nothing was claimed."""
    rows, methods = [], set()
    for folder in study.comparisons:
        try:
            comparison = claims.read(folder)
            found = claims.verdicts(comparison, runs.finished_runs(folder, comparison))
        except UserError as error:
            rows.append([str(folder), "—", "not known", "—", str(error), "—"])
            continue
        question = f"{comparison['question']} ({comparison['size']} size)"
        for verdict in found:
            effect, statement = verdict.effect, verdict.statement
            said = f"{effect}, {effect.n} pairs" if effect else "—"
            said += "" if verdict.logrank is None else f"; log-rank test p = {verdict.logrank:.2g}"
            claim, source = str(statement), statement.source
            rows.append([question, claim, verdict.outcome, said, verdict.reason, source])
            methods |= {effect.method} if effect else set()
    if not rows:
        return None
    caption = (
        "Of 95 % intervals one in twenty is expected to miss. "
        f"Found: {'; '.join(sorted(methods)) or 'nothing'}."
    )
    columns = ["question", "claim", "verdict", "found", "because", "source"]
    return Table("Verdicts", columns, rows, caption)


def results(study: Study) -> Table:
    """Returns what each variant came to."""
    targets = sorted({run.target_loss for run in study.runs})
    rows = []
    for variant, siblings in study.variants.items():
        whole = [run for run in siblings if run.summary]
        counted = whole or siblings
        tests = [run.test for run in counted if len(run.test.step)]
        known = [test.loss for test in tests if not np.isnan(test.loss).all()]
        number, total = len(whole), len(siblings)
        row = {
            "variant": variant,
            "runs": f"{number}" if number == total else f"{number} of {total} finished",
            "steps": _list(sorted({int(run.train.step[-1]) for run in counted})),
            "final test accuracy": _mean([test.accuracy[-1] for test in tests], 4),
            "final test loss": _mean([test.loss[-1] for test in tests], 3),
            "best test accuracy": _mean([test.accuracy.max() for test in tests], 4),
            "best test loss": _mean([np.nanmin(losses) for losses in known], 3),
            "final training loss": _mean([run.train.loss[-1] for run in counted], 4),
            f"steps to training loss {_list(targets)}": _reached(counted),
        }
        rows.append(row)
    caption = (
        "Mean over the seeds ± half of its 95 % interval by Student's t. Where runs of a variant "
        "are finished, the others do not count. The best is each run's own, over all its "
        "evaluations: it is chosen on the test images. Steps to a loss: the Kaplan-Meier median."
    )
    return Table("Results", [*rows[0]], [[*row.values()] for row in rows], caption)


def speed(study: Study) -> Table:
    """Returns how long training took, and on what."""
    rows = []
    for variant, siblings in study.variants.items():
        seconds = [[*run.seconds.values()][-1] for run in siblings if run.seconds]
        rates = [rate for run in siblings if (rate := _rate(run))]
        devices = {str(run.summary.get("device", "not known yet")) for run in siblings}
        rows.append([variant, _mean(seconds, 1), _mean(rates, 0), _list(sorted(devices))])
    caption = (
        "Of training, without compiling, evaluations and checkpoints. "
        "Images a second: the median step of each run, its first left out."
    )
    return Table("Time", ["variant", "seconds", "images a second", "device"], rows, caption)


def origins(study: Study) -> Table:
    """Returns data, versions and revisions: what has to be the same for the same result."""
    rows = []
    for variant, siblings in study.variants.items():
        summaries = [run.summary for run in siblings if run.summary]
        found = (
            {pixels(run) for run in siblings},
            {" ".join(f"{k} {v}" for k, v in summary["versions"].items()) for summary in summaries},
            {str(summary["git"]) for summary in summaries if summary.get("git")},
        )
        rows.append([variant, *(_list(sorted(values)) for values in found)])
    return Table("Data and versions", ["variant", "data", "versions", "revision"], rows)


def pixels(run: Run) -> str:
    """Returns which images a run saw."""
    official, words = run.summary.get("official_pixels"), ""
    if isinstance(official, bool):
        words = f",{'' if official else ' not'} the official pixels"
    if reason := run.summary.get("fallback_reason"):
        words += f" (in place of {run.config['config.data.name']}: {reason})"
    return f"{run.dataset}{words}"


def differences(study: Study) -> Table:
    """Returns the keys of the configs that are not the same for all variants."""
    configs = {variant: siblings[0].config for variant, siblings in study.variants.items()}
    rows = []
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        values = [config.get(key) for config in configs.values()]
        if key != "config.seed" and len({repr(value) for value in values}) > 1:
            rows.append([key.removeprefix("config."), *map(_plain, values)])
    return Table("What differs between the variants", ["key", *configs], rows)


def whole_config(study: Study) -> Table:
    """Returns all keys of the first run's config."""
    run = study.runs[0]
    rows = [[key.removeprefix("config."), _plain(value)] for key, value in run.config.items()]
    return Table(f"The whole config of {run.variant}", ["key", "value"], rows)


def commands(study: Study) -> list[str]:
    """Returns the commands that make these runs again: a comparison's own, or one for each run."""
    own = {
        folder: content["command"]
        for folder, content in study.comparisons.items()
        if isinstance(content.get("command"), str)
    }
    others = [run for run in study.runs if run.folder.parent.parent not in own]
    lines = [shlex.join([*command(run), "--workdir", str(run.folder)]) for run in others]
    return [*own.values(), *lines]


def _rate(run: Run) -> float:
    """Returns the images a second of the median step; 0 if there are too few steps."""
    laps = np.diff([*run.seconds.values()])
    batch = run.summary.get("batch_size") or run.config["config.train.batch_size"]
    return float(batch / np.median(laps)) if len(laps) and np.median(laps) > 0 else 0.0


def _mean(values: Sequence[float], digits: int) -> str:
    if not len(values):
        return "—"
    found = intervals.mean([float(value) for value in values])
    half = "" if found.n < 2 else f" ± {found.high - found.value:,.{digits}f}"
    return f"{found.value:,.{digits}f}{half}"


def _reached(counted: Sequence[Run]) -> str:
    """Returns the Kaplan-Meier median of the steps to the target loss."""
    found = [runs.time(run, "steps_to_loss", run.target_loss) for run in counted]
    times = intervals.Times(*map(tuple, zip(*found, strict=True)))
    middle, there = intervals.median(times).value, sum(times.reached)
    text = f"{middle:g}" if middle < float("inf") else "not reached"
    return text if there in (0, len(found)) else f"{text} ({there} of {len(found)} got there)"


def _plain(value: Any) -> str:
    if value is None:
        return "—"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) or "''"


def _list(values: Sequence[Any]) -> str:
    words = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return "; ".join(words) or "not known yet"
