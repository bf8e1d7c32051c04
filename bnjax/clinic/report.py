"""The findings of an audit, as text and as JSON."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from bnjax.text import text_table

WIDTH = 100


class Illness(NamedTuple):
    """Something that goes wrong with batch norm.

    Attributes:
        id: its name, which does not change between versions.
        title: a few words.
        why: why it matters.
        cure: how to mend it.
    """

    id: str
    title: str
    why: str
    cure: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """One illness of one network.

    Attributes:
        illness: the illness.
        layers: the names of the norms that have it; empty if it concerns the whole network.
        measured: the evidence, with figures.
    """

    illness: Illness
    layers: tuple[str, ...]
    measured: str

    @property
    def id(self) -> str:
        """The name of the illness."""
        return self.illness.id

    def __str__(self) -> str:
        """The finding with its cause and cure."""
        more = f" and {len(self.layers) - 6} more" if len(self.layers) > 6 else ""
        where = f"{', '.join(self.layers[:6])}{more}: " if self.layers else ""
        lines = [
            f"{self.id}: {self.illness.title}",
            f"  measured: {where}{self.measured}",
            f"  why it matters: {self.illness.why}",
            f"  to mend it: {self.illness.cure}",
        ]
        return "\n".join(map(_wrap, lines))


@dataclasses.dataclass(frozen=True)
class NotChecked:
    """A check that was not made, and what is missing for it."""

    id: str
    missing: str


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of one norm; None where there is none.

    Attributes:
        name: of the layer.
        shape: of its statistics.
        drift: stored minus expected mean in standard deviations, RMS over live channels.
        log_ratio: log(stored / expected variance), mean over live channels.
        noise: the standard deviation of a training batch's mean, in standard deviations, RMS.
        shift: mean log ratio of the variances in training and in evaluation.
        dead: the number of channels that do not vary.
        count: n, the values for each channel and batch in training.
        drifts, log_ratios: 5, 25, 50, 75 and 95 per cent quantiles over the live channels; empty
            if there is none.
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
    """The result of an audit; printed, it is a report.

    Attributes:
        found: the findings.
        not_checked: the checks that were not made.
        layers: a row for each norm, in the order of their calls.
        evaluation: "stored", "precise" and "batch" statistics -> `loss`, `accuracy` and `moved`,
            the mean total variation distance of the predictions from those under precise ones.
        examples: the number of audited examples.
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
        """The names of the illnesses, each once, sorted."""
        return tuple(sorted({finding.id for finding in self.found}))

    def ids_of(self, layer: str) -> tuple[str, ...]:
        """Returns the names of the illnesses of one layer."""
        return tuple(finding.id for finding in self.found if layer in finding.layers)

    def as_json(self) -> dict[str, Any]:
        """Returns everything as JSON values; NaN and infinity as text."""
        found = [
            finding.illness._asdict() | {"layers": finding.layers, "measured": finding.measured}
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
            }
        )

    def __str__(self) -> str:
        """The table of layers, the evaluations, and each finding with its cause and cure."""
        parts = [self._table(), self._evaluation(), *map(str, self.found)]
        if self.not_checked:
            lines = [f"  {entry.id}: {entry.missing}" for entry in self.not_checked]
            parts.append("\n".join(["not checked:", *map(_wrap, lines)]))
        count = len(self.found)
        verdict = f"{count} finding{'s' * (count != 1)}: {', '.join(self.ids)}"
        nothing = "healthy: nothing was found" if self.healthy else "there was nothing to audit"
        return "\n\n".join(part for part in [*parts, verdict if self.found else nothing] if part)

    def _table(self) -> str:
        if not self.layers:
            return ""
        head = ("layer", "shape", "drift", "log var", "noise", "train/eval", "dead", "n", "found")
        rows = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                _number(row.drift, ".3f"),
                _number(row.log_ratio, "+.3f"),
                _number(row.noise, ".3f"),
                _number(None if row.shift is None else math.exp(row.shift), ".3f"),
                _number(row.dead, "d"),
                _number(row.count, ",d"),
                ", ".join(self.ids_of(row.name)),
            )
            for row in self.layers
        ]
        note = (
            "drift: stored minus expected mean in standard deviations, RMS over live channels; "
            "log var: log(stored / expected variance); noise: of a training batch's mean; "
            "train/eval: ratio of variances with and without dropout; n: values for each channel "
            "and batch"
        )
        return "\n".join([text_table([head, *rows]), *textwrap.wrap(note, WIDTH)])

    def _evaluation(self) -> str:
        if not self.evaluation:
            return ""
        rows = [
            [f"  {name} statistics:", ", ".join(f"{key} {value:.4f}" for key, value in of.items())]
            for name, of in self.evaluation.items()
        ]
        return f"{self.examples:,} examples, normalised by\n{text_table(rows)}"


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
