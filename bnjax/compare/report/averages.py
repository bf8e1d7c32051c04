"""What the running averages cost, and how far off each is, as charts."""

from collections.abc import Iterator

import altair as alt
import numpy as np

from bnjax.compare.report import charts
from bnjax.compare.report.charts import STEP, Figure, Panel, Points, Row, chart_of
from bnjax.compare.report.study import Study
from bnjax.compare.runs import Run

WORDS = {
    "mean": "mean, standard deviations off",
    "variance": "variance, log(stored / true)",
}


def figures(study: Study) -> Iterator[Figure]:
    """Yields the cost for all variants, and the drift of each norm for the first seed of each."""
    yield _cost(study)
    for variant, runs in study.variants.items():
        run = next((run for run in runs if run.gaps), None)
        if run is None:
            continue
        caption = (
            "Of each norm, the stored mean and variance beside those of the same training images "
            "at the same weights; 0 is right. A variance above 0 makes the norm's output too small "
            "in evaluation, one below 0 too large."
        )
        heading = f"Drift of the running averages: {variant}, seed {run.seed}"
        panels = [_drift(run, of) for of in WORDS]
        yield Figure(charts.file_name(variant, "drift"), heading, caption, panels, details=True)


def _cost(study: Study) -> Figure:
    panels = []
    for key, sign in (("loss", 1), ("accuracy", -1)):

        def at_steps(run: Run, key: str = key, sign: int = sign) -> Points:
            steps = np.array([line["step"] for line in run.gaps], int)
            pairs = [(line[key], line[f"batch_{key}"]) for line in run.gaps]
            apart = [np.nan if None in pair else sign * (pair[0] - pair[1]) for pair in pairs]
            return steps, np.array(apart, float)

        if rows := charts.bands(study, at_steps):
            title = f"{key} lost by the stored statistics"
            panels.append(charts.lines(study, rows, title, charts.axis_scale(rows), points=True))
    caption = (
        "The same training images, evaluated with the running averages and with the statistics of "
        "their own batch: by how much the loss is higher and the accuracy lower with the former. "
        "Near 0 the averages are right; what then is left between training and test is not batch "
        "norm's."
    )
    return Figure("averages", "What the running averages cost", caption, panels)


def _drift(run: Run, of: str) -> Panel:
    rows: list[Row] = [
        {"x": line["step"], "y": value, "norm": name}
        for line in run.gaps
        for name, value in line[f"drift_{of}"].items()
        if value is not None
    ]
    names = list(dict.fromkeys(str(row["norm"]) for row in rows))
    legend = alt.Legend(title=None, orient="top", columns=3, labelLimit=200)
    return (
        chart_of(rows)
        .mark_line(point=True)
        .encode(
            x=alt.X("x:Q", axis=STEP),
            y=alt.Y("y:Q", title=WORDS[of]),
            color=alt.Color("norm:N", scale=alt.Scale(domain=names), legend=legend),
        )
        .properties(title=WORDS[of])
    )
