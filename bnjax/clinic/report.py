"""The findings of an audit: text, JSON and a page."""

import dataclasses
import html
import importlib
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from bnjax.errors import UserError
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


ILL, HEALTHY = "#d55e00", "#2a78b5"
TITLES = {
    "drifts": "stored minus expected mean, in standard deviations",
    "log_ratios": "log of stored over expected variance",
}


def check(out: Path) -> None:
    """Checks that a page can be written into a folder, which is created if need be.

    Raises:
        UserError: if not, or if the extra `report` is not installed.
    """
    try:
        importlib.import_module("bnjax.compare.report")
        out.mkdir(parents=True, exist_ok=True)
    except ModuleNotFoundError as error:
        raise UserError(
            f"a chart needs {error.name}, which is not installed. Install it with: "
            "pip install 'bnjax[report]', or leave out --out."
        ) from error
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}. Choose another folder with --out."
        ) from error


def write(findings: Findings, title: str, out: Path) -> Path:
    """Writes `audit.html` into a folder that was checked, and returns its path."""
    charts = [_panel(findings, quantity) for quantity in TITLES] if findings.layers else []
    (out / "audit.html").write_text(_page(findings, title, charts), encoding="utf-8")
    return out / "audit.html"


def _panel(findings: Findings, quantity: str) -> Any:
    """Returns a bar for each layer: from 5 to 95 % of its channels thin, from 25 to 75 % thick."""
    import altair as alt

    from bnjax.compare.report import chart_of

    rows = []
    for row in findings.layers:
        if not getattr(row, quantity):  # no channel varies
            continue
        found = findings.ids_of(row.name)
        state = {"layer": row.name, "found": ", ".join(found) or "nothing", "ill": bool(found)}
        values = [float(f"{value:.4g}") for value in getattr(row, quantity)]
        rows.append(state | dict(zip(("low", "from", "median", "to", "high"), values, strict=True)))
    y = alt.Y("layer:N", sort=None, title=None, axis=alt.Axis(labelLimit=300))
    tips = [alt.Tooltip(f"{name}:N") for name in ("layer", "found")]
    tips += [alt.Tooltip(f"{name}:Q") for name in ("low", "from", "median", "to", "high")]
    scale = alt.Scale(domain=[True, False], range=[ILL, HEALTHY])
    legend = alt.Legend(
        title=None, orient="top", labelExpr="datum.value ? 'something found' : 'nothing found'"
    )
    base = chart_of(rows).encode(
        y=y, tooltip=tips, color=alt.Color("ill:N", scale=scale, legend=legend)
    )
    zero = chart_of([{"zero": 0}]).mark_rule(color="#808080").encode(x=alt.X("zero:Q", title=None))
    return alt.layer(
        zero,
        base.mark_rule(strokeWidth=1.5).encode(x="low:Q", x2="high:Q"),
        base.mark_bar(height=8).encode(x="from:Q", x2="to:Q"),
        base.mark_tick(color="black", height=12).encode(x="median:Q", color=alt.value("#222222")),
    ).properties(width=380, height=alt.Step(18), title=TITLES[quantity])


def _page(findings: Findings, title: str, panels: list[Any]) -> str:
    text, heading = html.escape(str(findings)), html.escape(title)
    style = "<style>body{font:16px/1.5 system-ui,sans-serif;margin:1rem auto;max-width:76rem;padding:0 1rem}pre{white-space:pre-wrap;font-size:.85rem}</style>"  # noqa: E501
    drawn = ""
    if panels:
        import altair as alt

        from bnjax.compare.report import PAPER

        chart = alt.hconcat(*panels).configure(**PAPER)
        drawn = chart.to_html(inline=True, fullhtml=False, output_div="layers")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f"{style}</head>\n<body><h1>{heading}</h1>\n{drawn}\n"
        "<p>A bar for each layer: the thin line from 5 to 95 % of its channels, the thick one from "
        f"25 to 75 %, the mark at the median.</p>\n<pre>{text}</pre></body></html>\n"
    )
