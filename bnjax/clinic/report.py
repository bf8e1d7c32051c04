"""The findings of an audit, as text and as JSON."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from bnjax.text import text_table

WIDTH = 100
COLUMNS = """\
drift: stored minus expected mean in standard deviations, RMS over live channels; log var:
log(stored / expected variance); noise: of a training batch's mean; train/eval: ratio of variances
with and without dropout; n: values per channel and batch"""


class Illness(NamedTuple):
    """A kind of fault of batch norms.

    Attributes:
        id: a name that is the same in all versions.
        title: a few words.
        why: why it matters.
        cure: how to fix it.
    """

    id: str
    title: str
    why: str
    cure: str


@dataclasses.dataclass(frozen=True)
class Finding:
    """An illness found in a network.

    Attributes:
        illness: the illness.
        layers: the names of the affected norms; empty if it affects the whole network.
        measured: the measurements.
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
            f"  to fix it: {self.illness.cure}",
        ]
        return "\n".join(map(_wrap, lines))


@dataclasses.dataclass(frozen=True)
class NotChecked:
    """A skipped check and its missing input."""

    id: str
    missing: str


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of one norm; None if there is none.

    Attributes:
        name: the name of the layer.
        shape: the shape of its statistics.
        drift: stored minus expected mean in standard deviations, RMS over live channels.
        log_ratio: log(stored / expected variance), mean over live channels.
        noise: the standard deviation of a training batch's mean, in standard deviations, RMS.
        shift: mean log ratio of the variances in training and in evaluation.
        dead: the number of channels with constant output.
        count: n, the number of values per channel and batch in training.
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
        layers: a row for each norm, in the order of their calls.
        evaluation: "stored", "precise" and "batch" statistics -> `loss`, `accuracy` and `moved`,
            the mean total variation distance from the predictions under precise statistics.
        examples: the number of audited examples.
    """

    found: tuple[Finding, ...]
    not_checked: tuple[NotChecked, ...]
    layers: tuple[Row, ...] = ()
    evaluation: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    examples: int = 0

    @property
    def healthy(self) -> bool:
        """Whether the network has norms and the audit found nothing."""
        return bool(self.layers) and not self.found

    @property
    def ids(self) -> tuple[str, ...]:
        """The sorted names of the illnesses."""
        return tuple(sorted({finding.id for finding in self.found}))

    def ids_of(self, layer: str) -> tuple[str, ...]:
        """Returns the names of the illnesses of one layer."""
        return tuple(finding.id for finding in self.found if layer in finding.layers)

    def to_dict(self) -> dict[str, Any]:
        """Returns all fields as JSON values; NaN and infinity as text."""
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
        }
        return jax.tree.map(
            lambda leaf: leaf if not isinstance(leaf, float) or math.isfinite(leaf) else str(leaf),
            content,
        )

    def __str__(self) -> str:
        """The table of layers, the evaluations, and each finding with its cause and cure."""
        parts = []
        if self.layers:
            head = ("layer", "shape", "drift", "log var", "noise", "train/eval", "dead", "n")
            rows = [(*_cells(row), ", ".join(self.ids_of(row.name))) for row in self.layers]
            parts.append(f"{text_table([(*head, 'found'), *rows])}\n{COLUMNS}")
            rows = [
                (f"  {name} statistics:", ", ".join(f"{key} {x:.4f}" for key, x in of.items()))
                for name, of in self.evaluation.items()
            ]
            parts.append(f"{self.examples:,} examples, normalised by\n{text_table(rows)}")
        parts += map(str, self.found)
        if self.not_checked:
            lines = [f"  {entry.id}: {entry.missing}" for entry in self.not_checked]
            parts.append("\n".join(["not checked:", *map(_wrap, lines)]))
        if self.found:
            count = len(self.found)
            parts.append(f"{count} finding{'s' * (count != 1)}: {', '.join(self.ids)}")
        else:
            nothing = "healthy: nothing found" if self.healthy else "nothing to audit"
            parts.append(nothing)
        return "\n\n".join(parts)


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
