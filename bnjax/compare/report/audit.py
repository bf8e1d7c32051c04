"""An audit as one HTML file: the statistics of each layer as a chart, and what was found."""

import html
import importlib
from pathlib import Path
from typing import Any

from bnjax.clinic.audit import Findings
from bnjax.errors import UserError

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
        importlib.import_module("bnjax.compare.report.page")
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

    from bnjax.compare.report.charts import chart_of

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

        from bnjax.compare.report.page import PAPER

        chart = alt.hconcat(*panels).configure(**PAPER)
        drawn = chart.to_html(inline=True, fullhtml=False, output_div="layers")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f"{style}</head>\n<body><h1>{heading}</h1>\n{drawn}\n"
        "<p>A bar for each layer: the thin line from 5 to 95 % of its channels, the thick one from "
        f"25 to 75 %, the mark at the median.</p>\n<pre>{text}</pre></body></html>\n"
    )
