"""The pictures of a report, as Altair charts; text has the colour of the page around it."""

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import altair as alt
import numpy as np

from bnjax.compare import runs
from bnjax.compare.report.study import Study
from bnjax.compare.runs import Curve, Run

# Told apart by hue, by dash pattern and by marker, so that greyscale is enough.
COLOURS = ["#2a78b5", "#d55e00", "#1a9873", "#b8579a", "#c58a00", "#6a7be0", "#7f7f7f", "#a3562a"]
_DASHES = ("1 0", "6 3", "2 2", "8 3 2 3", "12 4", "4 2 1 2 1 2", "1 4", "10 2 2 2 2 2")
DASHES = [[int(length) for length in dashes.split()] for dashes in _DASHES]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross"]
SHAPES += [f"triangle-{way}" for way in ("down", "right", "left")]
MAX_POINTS = 300  # of one curve
STEP = alt.Axis(title="step", format="d", tickMinStep=1)

Row = dict[str, Any]
Panel = Any  # an Altair chart of any kind
Points = tuple[np.ndarray, np.ndarray]  # x and y


@dataclasses.dataclass(frozen=True)
class Figure:
    """Charts that belong together, with a caption.

    Attributes:
        name: of its file.
        title, caption: words around it.
        panels: the charts, 300 pixels wide.
        details: whether a reader may do without it at first.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]
    details: bool = False


def curves(study: Study) -> Figure:
    """Returns loss and accuracy of training batches and test images, all variants on one axis."""

    def at_steps(split: str, quantity: str) -> Callable[[Run], Points]:
        return lambda run: (getattr(run, split).step, getattr(getattr(run, split), quantity))

    panels = []
    for quantity in ("loss", "accuracy"):
        train, test = (bands(study, at_steps(split, quantity)) for split in ("train", "test"))
        if train + test:
            scale = axis_scale(train + test, log=quantity == "loss")
            title = f"{quantity}, training batches"
            panels.append(lines(study, train, title, scale, points=False))
            panels.append(lines(study, test, f"{quantity}, test images", scale, points=True))
    caption = (
        "Line: mean over the seeds. Band: from the lowest to the highest seed. The training loss "
        "is that of each batch before its step; the test images are evaluated with the running "
        f"statistics. Curves of more than {MAX_POINTS} steps are averaged over neighbours, and "
        "their bands hold all the neighbours' values."
    )
    return Figure("curves", "Loss and accuracy", caption, panels)


def steps_to_loss(study: Study) -> Figure:
    """Returns when each run first reached its target loss; those that did not are marked."""
    states = ["reached", "not reached so far"]
    rows = []
    for run in study.runs:
        step, reached = runs.time(run, "steps_to_loss", run.target_loss)
        found = {"step": step, "reached": states[not reached]}
        rows.append({"variant": run.variant, "seed": run.seed, **found})
    names, labels = list(study.variants), alt.Axis(labelLimit=130)
    points = (
        chart_of(rows)
        .mark_point(size=90, filled=True, strokeWidth=2)
        .encode(
            x=alt.X("step:Q", axis=STEP, scale=alt.Scale(zero=True)),
            y=alt.Y("variant:N", sort=names, title=None, axis=labels),
            yOffset=alt.YOffset("seed:O"),
            color=_colour(study, legend=None),
            shape=alt.Shape(
                "reached:N",
                scale=alt.Scale(domain=states, range=["circle", "triangle-right"]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=[alt.Tooltip(key) for key in ("variant:N", "seed:Q", "step:Q", "reached:N")],
        )
    )
    targets = ", ".join(f"{target:g}" for target in sorted({run.target_loss for run in study.runs}))
    caption = (
        f"One mark for each seed: the first step whose batch had a training loss of {targets} or "
        "less. A triangle stands at the last step of a run that never got there; its true number "
        "is larger."
    )
    chart = alt.layer(points).properties(width=300, height=max(60, 34 * len(names)))
    return Figure("steps_to_loss", f"Steps to a training loss of {targets}", caption, [chart])


def gap(study: Study) -> Figure:
    """Returns by how much the test loss is above the training loss."""

    def differences(run: Run) -> Points:
        train, test = run.train, run.test
        windows = [(train.step <= step) & (train.step > step - 10) for step in test.step]
        before = [train.loss[near].mean() if near.any() else np.nan for near in windows]
        return test.step, test.loss - np.array(before)

    rows = bands(study, differences)
    caption = (
        "Test loss minus the mean training loss of the last 10 batches before the evaluation. "
        "Above 0 and rising: overfitting."
    )
    title, panels = "test loss above training loss", []
    if rows:
        panels.append(lines(study, rows, title, axis_scale(rows), points=True))
    return Figure("gap", "The gap between training and test", caption, panels)


def against_time(study: Study) -> Figure:
    """Returns loss and accuracy over the seconds of training."""

    def at_seconds(run: Run, curve: Curve, values: np.ndarray) -> Points:
        known = np.array([step in run.seconds for step in curve.step.tolist()], bool)
        return np.array([run.seconds[step] for step in curve.step[known].tolist()]), values[known]

    panels = []
    losses = bands(study, lambda run: at_seconds(run, run.train, run.train.loss), every_run=True)
    accuracies = bands(
        study, lambda run: at_seconds(run, run.test, run.test.accuracy), every_run=True
    )
    axis = alt.Axis(title="seconds of training")
    if losses:
        scale = axis_scale(losses, log=True)
        title = "loss, training batches"
        panels.append(lines(study, losses, title, scale, points=False, axis=axis))
    if accuracies:
        scale, title = axis_scale(accuracies), "accuracy, test images"
        panels.append(lines(study, accuracies, title, scale, points=True, axis=axis))
    caption = (
        "The first seed of each variant. Compilation in the first step counts; evaluations and "
        "checkpoints do not."
    )
    return Figure("time", "Against time", caption, panels)


def file_name(variant: str, title: str) -> str:
    """Returns the name of a picture's file."""
    return re.sub(r"[^\w.-]+", "_", f"{title}_{variant}")


def chart_of(rows: list[Row]) -> alt.Chart:
    """Returns a chart that holds its data."""
    # As a plain dict: an InlineData would be checked value by value.
    return alt.Chart({"values": rows})


def _colour(study: Study, legend: Any) -> alt.Color:
    return alt.Color("variant:N", scale=_choices(study, COLOURS), legend=legend)


def _choices(study: Study, values: list[Any]) -> alt.Scale:
    """Returns the scale that gives each variant one of the values, over and over."""
    names = list(study.variants)
    return alt.Scale(domain=names, range=[values[i % len(values)] for i in range(len(names))])


def bands(study: Study, points: Callable[[Run], Points], *, every_run: bool = False) -> list[Row]:
    """Returns mean, lowest and highest value over a variant's seeds at each x.

    Args:
        study: whose runs are shown.
        points: of a run.
        every_run: every run has its own x; the first seed of each variant is shown.
    """
    rows = []
    for number, (variant, siblings) in enumerate(study.variants.items()):
        colour, shape = COLOURS[number % len(COLOURS)], SHAPES[number % len(SHAPES)]
        found: dict[float, list[float]] = {}
        for run in siblings[:1] if every_run else siblings:
            for x, y in zip(*points(run), strict=True):
                if np.isfinite(y):
                    found.setdefault(float(x), []).append(float(y))
        places = sorted(found)
        window = max(1, -(-len(places) // MAX_POINTS))
        for i in range(0, len(places), window):
            near = places[i : i + window]
            everything = [y for x in near for y in found[x]]
            mean = float(np.mean([float(np.mean(found[x])) for x in near]))
            numbers = {"x": near[-1], "mean": mean, "low": min(everything), "high": max(everything)}
            row = {name: float(f"{value:.5g}") for name, value in numbers.items()}
            rows.append({"variant": variant, "colour": colour, "shape": shape, **row})
    return rows


def axis_scale(rows: list[Row], *, log: bool = False) -> alt.Scale:
    """Returns the scale of an axis that holds the bands; logarithmic where they span a lot."""
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    if log and low > 0 and high > 5 * low:
        return alt.Scale(type="log", domain=[0.95 * low, 1.05 * high], nice=False)
    margin = 0.03 * (high - low) or 0.1
    return alt.Scale(domain=[low - margin, high + margin], nice=False, zero=False)


def _axis(scale: alt.Scale) -> alt.Axis:
    """Returns the axis of a scale; a logarithmic one has marks at 1, 2 and 5 times powers of 10."""
    content = scale.to_dict()
    if content.get("type") != "log":
        return alt.Axis(title=None)
    low, high = content["domain"]
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    marks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    return alt.Axis(title=None, values=[mark for mark in marks if low <= mark <= high], format="~g")


def lines(
    study: Study,
    rows: list[Row],
    title: str,
    scale: alt.Scale,
    *,
    points: bool,
    axis: alt.Axis = STEP,
) -> Panel:
    """Returns a line with a band for each variant; hovering shows the values at the nearest x."""
    variants = list(study.variants)
    legend = None
    if len(variants) > 1:
        columns = 2 if max(map(len, variants)) < 18 else 1
        style: Row = {"symbolType": "stroke", "symbolSize": 500, "labelLimit": 300}
        legend = alt.Legend(title=None, orient="top", columns=columns, **style)
    x = alt.X("x:Q", axis=axis, scale=alt.Scale(zero=True, nice=False))
    y, low = (alt.Y(f"{of}:Q", scale=scale, axis=_axis(scale)) for of in ("mean", "low"))
    colour = _colour(study, legend)
    # As they are: the legend shows lines alone.
    fill, shape = alt.Fill("colour:N", scale=None), alt.Shape("shape:N", scale=None)
    dash = alt.StrokeDash("variant:N", scale=_choices(study, DASHES), legend=legend)
    base = chart_of(rows)
    layers: list[Any] = [
        base.mark_area(opacity=0.16).encode(x=x, y=low, y2="high:Q", fill=fill),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash),
    ]
    if points:
        marks = base.mark_point(filled=True, size=40, opacity=1)
        layers.append(marks.encode(x=x, y=y, color=colour, shape=shape))
    nearest = alt.selection_point(
        name=re.sub(r"\W", "_", title),
        on="pointerover",
        nearest=True,
        fields=["x"],
        empty=False,
        clear="pointerout",
    )
    # Vega-Lite looks for the text in the cell around the nearest point, which holds that point as
    # its `datum`.
    said = {axis.title: "x", **{variant: f"v{i}" for i, variant in enumerate(variants)}}
    text = ", ".join(
        f"{json.dumps(name)}: (datum.datum || datum).{field}" for name, field in said.items()
    )
    layers.append(
        chart_of(_hovers(variants, rows))
        .mark_rule(color="currentColor")
        .encode(
            x=x,
            opacity=alt.condition(nearest, alt.value(0.5), alt.value(0)),
            tooltip=alt.TooltipValue(alt.ExprRef(f"{{{text}}}")),
        )
        .add_params(nearest)
    )
    return alt.layer(*layers).properties(width=300, height=230, title=title)


def _hovers(variants: list[str], rows: list[Row]) -> list[Row]:
    """Returns what hovering says at each x of each variant, "v0" for the first."""
    said: dict[float, Row] = {}
    for row in rows:
        spread = f" ({row['low']:.4g} to {row['high']:.4g})" if row["low"] < row["high"] else ""
        here = said.setdefault(
            row["x"], {"x": row["x"], **{f"v{i}": "—" for i in range(len(variants))}}
        )
        here[f"v{variants.index(row['variant'])}"] = f"{row['mean']:.4g}{spread}"
    return [said[x] for x in sorted(said)]
