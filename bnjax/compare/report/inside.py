"""What went on inside the networks, as charts: statistics, activations and gradients."""

from collections.abc import Iterator

import altair as alt
import numpy as np

from bnjax.compare.report.charts import COLOURS, STEP, Figure, Panel, chart_of, file_name
from bnjax.compare.report.study import Study
from bnjax.compare.runs import Run

MAX_COLUMNS = 12  # evaluations in a picture of histograms
MAX_LAYERS = 16


def figures(study: Study) -> Iterator[Figure]:
    """Yields what went on inside the network of the first seed of each variant."""
    words = {
        "mean": ("running mean", "The running mean of the channels"),
        "var": ("running variance", "The running variance of the channels"),
    }
    for variant, runs in study.variants.items():
        run = next((run for run in runs if run.histograms), None)
        if run is None:
            continue
        of = f"{variant}, seed {run.seed}"
        for leaf, (title, sentence) in words.items():
            names = [name for name in _names(run, "statistic") if name.rpartition(".")[2] == leaf]
            panels = [_fan(run, name, name.rpartition(".")[0]) for name in _few(names)]
            caption = (
                f"{sentence}: line: the median channel; dark band: the middle half; light band: "
                "from 5 to 95 %."
            )
            heading = f"{title.capitalize()}: {of}"
            yield Figure(file_name(variant, title), heading, caption, panels, details=True)
        for kind, sentence in (
            ("activation", "Outputs of each layer"),
            ("gradient", "Gradients of the mean loss in each layer's kernel"),
        ):
            names = [
                name
                for name in _names(run, kind)
                if kind == "activation" or name.rpartition(".")[2] == "kernel"
            ]
            panels = [_heat(run, kind, name) for name in _few(names)]
            caption = (
                f"{sentence}, on a fixed small batch of training images. The stronger the colour, "
                "the more of the values; each column adds up to 100 %. What lies beyond the range "
                "(1 % of a column at most) is counted at its ends."
            )
            heading = f"{kind.capitalize()}s: {of}"
            yield Figure(file_name(variant, kind), heading, caption, panels, details=True)


def _names(run: Run, kind: str) -> list[str]:
    return list(dict.fromkeys(name for line in run.histograms for name in line.get(kind, {})))


def _few(names: list[str]) -> list[str]:
    """Returns at most `MAX_LAYERS` of the names, at equal distances."""
    count = min(len(names), MAX_LAYERS)
    return [names[i * len(names) // count] for i in range(count)]


def _fan(run: Run, name: str, title: str) -> Panel:
    keys = ("low", "lower", "median", "upper", "high")
    rows = []
    for line in run.histograms:
        if numbers := line.get("statistic", {}).get(name):
            rows.append(
                {"step": line["step"], **dict(zip(keys, numbers["quantiles"][2:7], strict=True))}
            )
    base, x = chart_of(rows), alt.X("step:Q", axis=STEP)
    words = ("5 %", "25 %", "median", "75 %", "95 %")
    tooltip = [
        alt.Tooltip("step:Q"),
        *(
            alt.Tooltip(f"{key}:Q", title=text, format=".4~g")
            for key, text in zip(keys, words, strict=True)
        ),
    ]
    colour = COLOURS[0]

    def band(low: str, high: str, opacity: float) -> alt.Chart:
        return base.mark_area(opacity=opacity, color=colour).encode(
            x=x, y=alt.Y(f"{low}:Q", title=None), y2=f"{high}:Q"
        )

    line_ = base.mark_line(color=colour, point={"filled": True, "size": 25}).encode(
        x=x, y=alt.Y("median:Q", title=None)
    )
    catch = base.mark_rule(opacity=0, strokeWidth=14).encode(x=x, tooltip=tooltip)
    return alt.layer(
        band("low", "high", 0.18), band("lower", "upper", 0.3), line_, catch
    ).properties(width=300, height=130, title=title)


def _heat(run: Run, kind: str, name: str) -> Panel:
    """Returns a column of shaded bins for each of a few evaluations."""
    lines = [line for line in run.histograms if name in line.get(kind, {})]
    count = min(len(lines), MAX_COLUMNS)
    rows = []
    for line in (lines[(i + 1) * len(lines) // count - 1] for i in range(count)):
        numbers = line[kind][name]
        edges = np.linspace(numbers["low"], numbers["high"], len(numbers["counts"]) + 1)
        total = sum(numbers["counts"]) or 1
        for low, high, inside_ in zip(edges[:-1], edges[1:], numbers["counts"], strict=True):
            if inside_:
                row = {"low": low, "high": high, "share": inside_ / total}
                rows.append(
                    {
                        "step": line["step"],
                        **{key: float(f"{value:.4g}") for key, value in row.items()},
                    }
                )
    tooltip = [
        alt.Tooltip("step:O"),
        alt.Tooltip("low:Q", title="from", format=".3~g"),
        alt.Tooltip("high:Q", title="to", format=".3~g"),
        alt.Tooltip("share:Q", title="share", format=".1%"),
    ]
    most = max((row["share"] for row in rows), default=1.0)
    chart = (
        chart_of(rows)
        .mark_rect(color=COLOURS[0])
        .encode(
            x=alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("low:Q", title=None, axis=alt.Axis(format="~g", tickCount=5)),
            y2="high:Q",
            opacity=alt.Opacity(
                "share:Q", scale=alt.Scale(type="sqrt", domain=[0, most], range=[0, 1]), legend=None
            ),
            tooltip=tooltip,
        )
    )
    return alt.layer(chart).properties(width=300, height=130, title=name)
