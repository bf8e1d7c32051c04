"""The numbers of a report, in words and tables."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnjax.compare import claims, intervals
from bnjax.compare.report.runs import Run, Study
from bnjax.compare.results import read_runs
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
            found = claims.verdicts(comparison, read_runs(folder, comparison))
        except UserError as error:
            rows.append([str(folder), "—", "not known", "—", str(error), "—"])
            continue
        for verdict in found:
            effect, statement = verdict.effect, verdict.statement
            said = f"{effect}, {effect.n} pairs" if effect else "—"
            said += "" if verdict.logrank is None else f"; log-rank test p = {verdict.logrank:.2g}"
            question = f"{comparison['question']} ({comparison['size']} size)"
            rows.append(
                [question, str(statement), verdict.outcome, said, verdict.reason, statement.source]
            )
            methods |= {effect.method} if effect else set()
    if not rows:
        return None
    caption = f"Of 95 % intervals one in twenty is expected to miss. Found: {'; '.join(sorted(methods)) or 'nothing'}."
    return Table(
        "Verdicts", ["question", "claim", "verdict", "found", "because", "source"], rows, caption
    )


def results(study: Study) -> Table:
    """Returns what each variant came to."""
    targets = sorted({run.target_loss for run in study.runs})
    columns = [
        "variant",
        "runs",
        "steps",
        "final test accuracy",
        "final test loss",
        "best test accuracy",
        "best test loss",
    ]
    columns += ["final training loss", f"steps to training loss {_list(targets)}"]
    rows = []
    for variant, runs in study.variants.items():
        whole = [run for run in runs if run.summary]
        counted = whole or runs
        tested = [run for run in counted if len(run.test.step)]
        rows.append(
            [
                variant,
                f"{len(whole)}"
                if len(whole) == len(runs)
                else f"{len(whole)} of {len(runs)} finished",
                _list(sorted({int(run.train.step[-1]) for run in counted})),
                _mean([run.test.accuracy[-1] for run in tested], 4),
                _mean([run.test.loss[-1] for run in tested], 3),
                _mean([run.test.accuracy.max() for run in tested], 4),
                _mean(
                    [
                        np.nanmin(run.test.loss)
                        for run in tested
                        if not np.isnan(run.test.loss).all()
                    ],
                    3,
                ),
                _mean([run.train.loss[-1] for run in counted], 4),
                _reached(counted),
            ]
        )
    caption = (
        "Mean over the seeds ± half of its 95 % interval by Student's t. Where runs of a variant are finished, the others do not count. "
        "The best is each run's own, over all its evaluations: it is chosen on the test images. Steps to a loss: the Kaplan-Meier median."
    )
    return Table("Results", columns, rows, caption)


def speed(study: Study) -> Table:
    """Returns how long training took, and on what."""
    rows = []
    for variant, runs in study.variants.items():
        timed = [run for run in runs if len(run.seconds)]
        rates = [rate for run in timed if (rate := _rate(run))]
        devices = {str(run.summary.get("device", "not known yet")) for run in runs}
        rows.append(
            [
                variant,
                _mean([run.seconds[-1] for run in timed], 1),
                _mean(rates, 0),
                _list(sorted(devices)),
            ]
        )
    caption = (
        "Of training, the compilation in its first step included, evaluations and checkpoints not. Images a second: the median step "
        "of each run, its first left out."
    )
    return Table("Time", ["variant", "seconds", "images a second", "device"], rows, caption)


def origins(study: Study) -> Table:
    """Returns data, versions and revisions: what has to be the same for the same result."""
    rows = []
    for variant, runs in study.variants.items():
        versions = {
            " ".join(f"{name} {version}" for name, version in run.summary["versions"].items())
            for run in runs
            if run.summary
        }
        revisions = {str(run.summary["git"]) for run in runs if run.summary.get("git")}
        rows.append(
            [
                variant,
                _list(sorted({pixels(run) for run in runs})),
                _list(sorted(versions)),
                _list(sorted(revisions)),
            ]
        )
    return Table("Data and versions", ["variant", "data", "versions", "revision"], rows)


def pixels(run: Run) -> str:
    """Returns which images a run saw."""
    official = run.summary.get("official_pixels")
    words = (
        {True: ", the official pixels", False: ", not the official pixels"}.get(official, "")
        if isinstance(official, bool)
        else ""
    )
    reason = run.summary.get("fallback_reason")
    return f"{run.dataset}{words}" + (
        f" (in place of {run.config['config.data.name']}: {reason})" if reason else ""
    )


def differences(study: Study) -> Table:
    """Returns the keys of the configs that are not the same for all variants."""
    configs = {variant: runs[0].config for variant, runs in study.variants.items()}
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    different = [
        key
        for key in keys
        if len({repr(config.get(key)) for config in configs.values()}) > 1 and key != "config.seed"
    ]
    rows = [
        [key.removeprefix("config."), *(_plain(config.get(key)) for config in configs.values())]
        for key in different
    ]
    return Table("What differs between the variants", ["key", *configs], rows)


def whole_config(study: Study) -> Table:
    """Returns all keys of the first run's config."""
    run = study.runs[0]
    return Table(
        f"The whole config of {run.variant}",
        ["key", "value"],
        [[key.removeprefix("config."), _plain(value)] for key, value in run.config.items()],
    )


def commands(study: Study) -> list[str]:
    """Returns the commands that make these runs again: of each comparison its own, of other runs one each."""
    own = {
        folder: content["command"]
        for folder, content in study.comparisons.items()
        if isinstance(content.get("command"), str)
    }
    others = [run for run in study.runs if run.folder.parent.parent not in own]
    return [
        *own.values(),
        *(shlex.join([*run.command, "--workdir", str(run.folder)]) for run in others),
    ]


def _rate(run: Run) -> float:
    """Returns the images a second of the median step; 0 if there are too few steps."""
    laps = np.diff(run.seconds)
    batch = run.summary.get("batch_size") or run.config["config.train.batch_size"]
    return float(batch / np.median(laps)) if len(laps) and np.median(laps) > 0 else 0.0


def _mean(values: Sequence[float], digits: int) -> str:
    if not len(values):
        return "—"
    found = intervals.mean([float(value) for value in values])
    return f"{found.value:,.{digits}f}" + (
        "" if found.n < 2 else f" ± {found.high - found.value:,.{digits}f}"
    )


def _reached(runs: Sequence[Run]) -> str:
    """Returns the Kaplan-Meier median of the steps to the target loss."""
    times = intervals.Times(
        tuple(run.steps_to_loss or int(run.train.step[-1]) for run in runs),
        tuple(run.steps_to_loss is not None for run in runs),
    )
    middle, there = intervals.median(times).value, sum(times.reached)
    text = f"{middle:g}" if middle < float("inf") else "not reached"
    return text if there in (0, len(runs)) else f"{text} ({there} of {len(runs)} got there)"


def _plain(value: Any) -> str:
    return (
        "—"
        if value is None
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value) or "''"
    )


def _list(values: Sequence[Any]) -> str:
    return (
        "; ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        or "not known yet"
    )
