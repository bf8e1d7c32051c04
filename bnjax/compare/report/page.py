"""The report as one HTML file that needs nothing else, and as Markdown with pictures."""

import functools
import io
import json
import sys
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import tqdm
import vl_convert
from PIL import Image

from bnjax.compare.report import MARK, averages, charts, inside, tables
from bnjax.compare.report.charts import Figure
from bnjax.compare.report.study import Study

PICTURES = "report_files"
VERSION = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]  # of Vega-Lite
# In the page, text and lines take the colour of the text around them, light or dark.
ADAPTING = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "title": {"color": "currentColor", "fontSize": 13, "anchor": "start", "fontWeight": 600},
    "axis": {
        "labelColor": "currentColor",
        "titleColor": "currentColor",
        "domainColor": "currentColor",
        "tickColor": "currentColor",
        "gridColor": "#808080",
        "gridOpacity": 0.25,
        "titleFontWeight": "normal",
    },
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12},
}
PAPER = json.loads(json.dumps(ADAPTING).replace("currentColor", "#222222")) | {
    "background": "white",
    "font": "sans-serif",
}


def write_page(study: Study, out: Path) -> Path:
    """Writes `report.html`, `report.md` and `report_files/`, and returns the path of the first."""
    drawn = (
        charts.curves(study),
        charts.steps_to_loss(study),
        charts.gap(study),
        *averages.figures(study),
        charts.against_time(study),
        *inside.figures(study),
    )
    shown = [figure for figure in drawn if figure.panels]
    specs, places = _specs(shown)
    verdicts = tables.verdict_table(study)
    common = {
        "mark": MARK,
        "title": _title(study),
        "lead": _lead(study),
        "problems": study.problems,
        "tables_first": [*([verdicts] if verdicts else []), tables.results(study)],
        "tables_last": [tables.speed(study), tables.differences(study), tables.origins(study)],
        "figures": shown,
        "commands": tables.commands(study),
        "config": tables.whole_config(study),
    }
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    pictures = {}
    for figure in tqdm.tqdm(
        shown, unit="picture", disable=not sys.stderr.isatty(), dynamic_ncols=True
    ):
        pictures[figure.name] = f"{PICTURES}/{figure.name}.png"
        (out / pictures[figure.name]).write_bytes(_png(figure))
    text = _template("page.md").render(**common, pictures=pictures)
    (out / "report.md").write_text(text, encoding="utf-8")
    page = _template("page.html").render(**common, specs=specs, places=places, library=_library())
    (out / "report.html").write_text(page, encoding="utf-8")
    return out / "report.html"


@functools.cache
def _library() -> str:
    """Returns what draws the charts in a browser, as JavaScript for a script element."""
    return str(
        vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION)
    ).replace("</script", "<\\/script")


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bnjax.compare.report", "."),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def _specs(shown: list[Figure]) -> tuple[str, dict[str, list[str]]]:
    """Returns all charts as one JavaScript object by their places, and the places by figure."""
    specs: dict[str, Any] = {}
    places: dict[str, list[str]] = {}
    for number, figure in enumerate(shown):
        places[figure.name] = []
        for i, panel in enumerate(figure.panels):
            name = f"chart{number}-{i}"
            places[figure.name].append(name)
            specs[name] = {
                **panel.to_dict(validate=False),
                "width": "container",
                "config": ADAPTING,
            }
    # A name may hold "</script>" or "<!--".
    return json.dumps(specs, separators=(",", ":")).replace("<", "\\u003c"), places


def _png(figure: Figure) -> bytes:
    """Returns the panels of a figure on white, in few colours: a tenth of the bytes."""
    columns = 1 if len(figure.panels) == 1 else 2 if len(figure.panels) <= 4 else 3
    spec = {**alt.concat(*figure.panels, columns=columns).to_dict(validate=False), "config": PAPER}
    png = vl_convert.vegalite_to_png(spec, vl_version=VERSION, scale=1.5)
    picture, small = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


def _lead(study: Study) -> str:
    """Returns what the report is about, in a sentence or two."""
    data = " and ".join(sorted({tables.pixels(run) for run in study.runs}))
    runs, variants = (
        f"{len(some)} {word}{'s' * (len(some) > 1)}"
        for some, word in ((study.runs, "run"), (study.variants, "variant"))
    )
    return f"{runs} of {variants}, trained on {data}."


def _title(study: Study) -> str:
    names = list(study.variants)
    return (
        ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
    )
