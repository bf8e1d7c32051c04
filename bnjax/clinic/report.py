"""Formats the findings of an audit as text, as a notebook table and as JSON."""

import dataclasses
import html
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bnjax.text import text_table

WIDTH = 100
HEAD = ("layer", "shape", "drift", "log var", "noise", "train/eval", "dead", "n", "found")
COLUMNS = """\
drift: stored minus expected mean in standard deviations, RMS over live channels; log var:
log(stored / expected variance); noise: standard error of a training batch's mean, in standard
deviations; train/eval: ratio of the variances with and without dropout; dead: channels with
constant output; n: values per channel in a training batch; moved: the share of the predicted
probability that moves to other classes, compared with precise statistics"""
# The page on a finding. An installed package contains these pages; a checkout has them next to it.
_HOME = Path(__file__).parents[1] / "docs"
PAGE = f"{_HOME if _HOME.is_dir() else 'docs'}/findings/{{}}.md"


class Illness(NamedTuple):
    """A kind of fault in batch norms.

    Attributes:
        id: the name, which is stable across versions.
        title: a short description.
        why: the reason the fault matters.
        cure: the way to fix the fault.
    """

    id: str
    title: str
    why: str
    cure: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """An illness found in a network.

    Attributes:
        illness: the kind of fault.
        layers: the names of the affected norms; empty if the whole network is affected.
        measured: the measurements in words.
    """

    illness: Illness
    layers: tuple[str, ...]
    measured: str

    @property
    def id(self) -> str:
        """The name of the illness."""
        return self.illness.id

    def __str__(self) -> str:
        """Returns the finding with its cause and cure."""
        more = f" and {len(self.layers) - 6} more" if len(self.layers) > 6 else ""
        where = f"{', '.join(self.layers[:6])}{more}: " if self.layers else ""
        lines = [
            f"{self.id}: {self.illness.title}",
            f"  measured: {where}{self.measured}",
            f"  why it matters: {self.illness.why}",
            f"  to fix it: {self.illness.cure}",
            f"  more: {PAGE.format(self.id)}",
        ]
        return "\n".join(map(_wrap, lines))


@dataclasses.dataclass(frozen=True)
class NotChecked:
    """A skipped check and the input that it lacks."""

    id: str
    missing: str


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of one norm; None for a missing measurement.

    Attributes:
        name: the name of the layer.
        shape: the shape of the norm's statistics.
        drift: the stored minus the expected mean in standard deviations, RMS over live channels.
        log_ratio: log(stored / expected variance), averaged over live channels.
        noise: the standard error of the mean of a training batch in standard deviations, RMS.
        shift: the mean log ratio of the variance in training to the variance in evaluation.
        dead: the number of channels with constant output.
        count: the number n of values per channel in a training batch.
    """

    name: str
    shape: tuple[int, ...]
    drift: float
    log_ratio: float | None
    noise: float | None
    shift: float | None
    dead: int
    count: int


@dataclasses.dataclass(frozen=True)
class Findings:
    """The result of an audit; `print` shows it as a report.

    Attributes:
        found: the findings.
        not_checked: the skipped checks.
        layers: one row for each norm, in the order of calls.
        evaluation: the metrics under "stored", "precise" and "batch" statistics: `loss`, `accuracy`
            and `moved`, the mean total variation distance from predictions under precise
            statistics.
        examples: the number of audited examples.
        limits: maps fields of `Row` to the absolute values at which cells turn from green to yellow
            and bold; for `dead`, the limit is a fraction of the channels.
    """

    found: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]
    layers: tuple[Row, ...] = ()
    evaluation: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    examples: int = 0
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def healthy(self) -> bool:
        """Whether the network has norms and the audit found nothing."""
        return bool(self.layers) and not self.found

    @property
    def ids(self) -> tuple[str, ...]:
        """The sorted names of the illnesses found."""
        return tuple(sorted({finding.id for finding in self.found}))

    def ids_of(self, layer: str) -> tuple[str, ...]:
        """Returns the names of the illnesses found in one layer."""
        return tuple(finding.id for finding in self.found if layer in finding.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON values, with NaN and infinity as strings."""
        content = {
            "healthy": self.healthy,
            "examples": self.examples,
            "findings": [
                one.illness._asdict() | {"layers": one.layers, "measured": one.measured}
                for one in self.found
            ],
            "not_checked": [dataclasses.asdict(one) for one in self.not_checked],
            "layers": [
                dataclasses.asdict(row) | {"found": self.ids_of(row.name)} for row in self.layers
            ],
            "evaluation": self.evaluation,
            "limits": self.limits,
        }
        return jax.tree.map(
            lambda leaf: leaf if not isinstance(leaf, float) or math.isfinite(leaf) else str(leaf),
            content,
        )

    def __str__(self) -> str:
        """Returns the table of layers, the evaluations, and the findings with their cures."""
        rows = [(*_cells(row), ", ".join(self.ids_of(row.name))) for row in self.layers]
        table = f"{text_table([HEAD, *rows])}\n" if rows else ""
        return table + self._below_table()

    def _repr_html_(self) -> str:
        """Returns the report for a notebook; colours show each value relative to its limit."""
        rows = ["".join(_html_cell(f"<b>{name}</b>") for name in HEAD)] if self.layers else []
        for row in self.layers:
            cells = map(_html_cell, map(html.escape, _cells(row)), self._styles(row))
            rows.append("".join([*cells, _html_cell(" ".join(map(_link, self.ids_of(row.name))))]))
        table = "\n".join(f"<tr>{row}</tr>" for row in rows)
        return f"<table>{table}</table>\n<pre>{html.escape(self._below_table())}</pre>"

    def _below_table(self) -> str:
        parts = []
        if self.layers:
            rows = [
                (f"  {name} statistics:", ", ".join(f"{key} {x:.4f}" for key, x in of.items()))
                for name, of in self.evaluation.items()
            ]
            parts = [COLUMNS, f"{self.examples:,} examples, normalised by\n{text_table(rows)}"]
        parts += map(str, self.found)
        if self.not_checked:
            lines = [f"  {entry.id}: needs {entry.missing}" for entry in self.not_checked]
            parts.append("\n".join(["not checked:", *map(_wrap, lines)]))
        return "\n\n".join([*parts, self._summary])

    def _styles(self, row: Row) -> list[str]:
        """Returns the CSS of each cell, from green for 0 to red for twice the limit.

        The limits are in the order of the columns.
        """
        values = dataclasses.asdict(row) | {"dead": row.dead / math.prod(row.shape)}
        styles = ["", ""]
        for field, limit in self.limits.items():
            if (value := values[field]) is None:
                styles.append("")
                continue
            far = min(2.0, abs(value) / limit)  # NaN is 2
            weight = "bold" if far >= 1 else "normal"
            hue = 120 - 60 * far
            styles.append(f"background: hsla({hue:.0f}, 80%, 45%, 0.35); font-weight: {weight}")
        return [*styles, ""]

    @property
    def _summary(self) -> str:
        if self.found:
            count = len(self.found)
            return f"{count} finding{'s' * (count != 1)}: {', '.join(self.ids)}"
        if any(one.id == "stale by fit" for one in self.not_checked):
            return "nothing found, but whether the averages are right was not checked (see above)"
        return "healthy: nothing found" if self.healthy else "nothing to audit"


def _html_cell(content: str, style: str = "") -> str:
    return f'<td style="text-align: left; padding: 2px 8px; {style}">{content}'


def _link(id_: str) -> str:
    return f'<a style="color: inherit" href="{PAGE.format(id_)}">{id_}</a>'


def _cells(row: Row) -> list[str]:
    values = (
        (row.drift, ".3f"),
        (row.log_ratio, "+.3f"),
        (row.noise, ".3f"),
        (None if row.shift is None else math.exp(row.shift), ".3f"),
        (row.dead, "d"),
        (row.count, ",d"),
    )
    cells = ["-" if value is None else format(value, form) for value, form in values]
    return [row.name, "x".join(map(str, row.shape)), *cells]


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
