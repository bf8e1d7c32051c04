"""What an audit came to: findings, what was not checked, and a row for each layer."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from typing import Any

from bnjax.clinic.illnesses import ILLNESSES, Illness
from bnjax.clinic.limits import LIMITS

WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Finding:
    """One illness of one network.

    Attributes:
        id: of `ILLNESSES`; it does not change between versions.
        layers: the norms that have it, by name; empty if it is the whole network's.
        measured: what was found, with figures.
    """

    id: str
    layers: tuple[str, ...]
    measured: str

    @property
    def illness(self) -> Illness:
        """What it is in words, why it matters, and how to mend it."""
        return ILLNESSES[self.id]


@dataclasses.dataclass(frozen=True)
class NotChecked:
    """What could not be checked, and what is missing for it."""

    id: str
    missing: str


@dataclasses.dataclass(frozen=True)
class Row:
    """What was measured of one norm; None where it could not be.

    Attributes:
        name: of the layer.
        shape: of its statistics.
        drift: RMS over the live channels of stored minus expected mean, in standard deviations.
        log_ratio: mean over them of log(stored / expected variance).
        noise: RMS of the standard deviation of a training batch's mean, in standard deviations.
        shift: mean log ratio of the variances in training and in evaluation.
        dead: how many channels do not vary.
        count: n, values for each channel and batch in training.
        drifts, log_ratios: the former two at their 5, 25, 50, 75 and 95 per cent quantiles; empty
            if all channels are dead.
    """

    name: str
    shape: tuple[int, ...]
    drift: float | None = None
    log_ratio: float | None = None
    noise: float | None = None
    shift: float | None = None
    dead: int | None = None
    count: int | None = None
    drifts: tuple[float, ...] = ()
    log_ratios: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of an audit.

    Attributes:
        found: the findings.
        not_checked: what could not be checked.
        layers: a row for each norm, in the order of their calls.
        evaluation: "stored", "precise" and "batch" statistics -> `loss`, `accuracy` and `moved`,
            the mean total variation distance of the predictions from those under precise ones.
        examples: how many were looked at.
    """

    found: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...] = ()
    layers: tuple[Row, ...] = ()
    evaluation: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    examples: int = 0

    @property
    def healthy(self) -> bool:
        """Whether there was a norm to look at, and nothing was found."""
        return bool(self.layers) and not self.found

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of what was found, each once, sorted."""
        return tuple(sorted({finding.id for finding in self.found}))

    def ids_of(self, layer: str) -> tuple[str, ...]:
        """Returns the ids of what one layer has."""
        return tuple(finding.id for finding in self.found if layer in finding.layers)

    def as_json(self) -> dict[str, Any]:
        """Returns all of it as what JSON knows; NaN and infinity as text."""
        found = [
            {
                "id": finding.id,
                "layers": [*finding.layers],
                "measured": finding.measured,
                **finding.illness._asdict(),
            }
            for finding in self.found
        ]
        rows = [dataclasses.asdict(row) | {"found": self.ids_of(row.name)} for row in self.layers]
        return _plain(
            {
                "healthy": self.healthy,
                "examples": self.examples,
                "findings": found,
                "not_checked": [dataclasses.asdict(entry) for entry in self.not_checked],
                "layers": rows,
                "evaluation": self.evaluation,
                "limits": {name: limit._asdict() for name, limit in LIMITS.items()},
            }
        )

    def __str__(self) -> str:
        """The table, the evaluations, and each finding with its cure."""
        parts = [_table(self)]
        if self.evaluation:
            parts.append(_evaluation(self))
        for finding in self.found:
            parts.append(_paragraphs(finding))
        if self.not_checked:
            lines = [f"  {entry.id}: {entry.missing}" for entry in self.not_checked]
            parts.append("\n".join(["not checked:", *map(_wrap, lines)]))
        count = len(self.found)
        verdict = f"{count} finding{'s' * (count != 1)}: {', '.join(self.ids)}"
        nothing = "healthy: nothing was found" if self.healthy else "there was nothing to audit"
        parts.append(verdict if self.found else nothing)
        return "\n\n".join(part for part in parts if part)


def _table(findings: Findings) -> str:
    if not findings.layers:
        return ""
    head = ("layer", "shape", "drift", "log var", "noise", "train/eval", "dead", "n", "found")
    cells = [head]
    for row in findings.layers:
        cells.append(
            (
                row.name,
                "x".join(map(str, row.shape)),
                _number(row.drift, ".3f"),
                _number(row.log_ratio, "+.3f"),
                _number(row.noise, ".3f"),
                _number(None if row.shift is None else math.exp(row.shift), ".3f"),
                _number(row.dead, "d"),
                _number(row.count, ",d"),
                ", ".join(findings.ids_of(row.name)),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
             for line in cells]  # fmt: skip
    note = (
        "drift: stored minus expected mean in standard deviations, RMS over live channels; "
        "log var: log(stored / expected variance); noise: of a training batch's mean; train/eval: "
        "ratio of variances with and without dropout; n: values for each channel and batch"
    )
    return "\n".join([*(line.rstrip() for line in lines), *textwrap.wrap(note, WIDTH)])


def _evaluation(findings: Findings) -> str:
    lines = [f"{findings.examples:,} examples, normalised by"]
    for name, means in findings.evaluation.items():
        words = [f"{key} {value:.4f}" for key, value in means.items()]
        lines.append(f"  {name} statistics:".ljust(23) + ", ".join(words))
    return "\n".join(lines)


def _paragraphs(finding: Finding) -> str:
    names = finding.layers
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    where = f"{', '.join(names[:6])}{more}: " if names else ""
    title, why, cure = finding.illness
    lines = [
        f"{finding.id}: {title}",
        f"  measured: {where}{finding.measured}",
        f"  why it matters: {why}",
        f"  to mend it: {cure}",
    ]
    return "\n".join(map(_wrap, lines))


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
