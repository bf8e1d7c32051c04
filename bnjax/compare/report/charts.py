"""The pictures of a report, as Altair charts that fit any background: text has the colour of the page around it."""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import altair as alt
import numpy as np

from bnjax.compare.report.runs import Curve, Run, Study

# Told apart by hue, by dash pattern and by marker, so that greyscale is enough.
COLOURS = ["#2a78b5", "#d55e00", "#1a9873", "#b8579a", "#c58a00", "#6a7be0", "#7f7f7f", "#a3562a"]
DASHES = [
    [1, 0],
    [6, 3],
    [2, 2],
    [8, 3, 2, 3],
    [12, 4],
    [4, 2, 1, 2, 1, 2],
    [1, 4],
    [10, 2, 2, 2, 2, 2],
]
SHAPES = [
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
]
MOST_POINTS = 300  # of one curve
STEP = alt.Axis(title="step", format="d", tickMinStep=1)

Row = dict[str, Any]
Panel = Any  # an Altair chart of any kind


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

    def at_steps(split: str, quantity: str) -> Callable[[Run], tuple[np.ndarray, np.ndarray]]:
        return lambda run: (getattr(run, split).step, getattr(getattr(run, split), quantity))

    panels = []
    for quantity in ("loss", "accuracy"):
        train, test = (_bands(study, at_steps(split, quantity)) for split in ("train", "test"))
        if train + test:
            scale = _scale(train + test, log=quantity == "loss")
            panels.append(
                _lines(study, train, f"{quantity}, training batches", scale, points=False)
            )
            panels.append(_lines(study, test, f"{quantity}, test images", scale, points=True))
    caption = (
        "Line: mean over the seeds. Band: from the lowest to the highest seed. The training loss is that of each batch before its step; "
        f"the test images are evaluated with the running statistics. Curves of more than {MOST_POINTS} steps are averaged over neighbours, "
        "and their bands hold all the neighbours' values."
    )
    return Figure("curves", "Loss and accuracy", caption, panels)


def steps_to_loss(study: Study) -> Figure:
    """Returns when each run first reached its target loss; those that did not are marked."""
    rows = [
        {
            "variant": run.variant,
            "seed": run.seed,
            "step": run.steps_to_loss or int(run.train.step[-1]),
            "reached": "reached" if run.steps_to_loss else "not reached so far",
        }
        for run in study.runs
    ]
    tooltip = [
        alt.Tooltip("variant:N"),
        alt.Tooltip("seed:Q"),
        alt.Tooltip("step:Q"),
        alt.Tooltip("reached:N"),
    ]
    points = (
        chart_of(rows)
        .mark_point(size=90, filled=True, strokeWidth=2)
        .encode(
            x=alt.X("step:Q", axis=STEP, scale=alt.Scale(zero=True)),
            y=alt.Y(
                "variant:N", sort=list(study.variants), title=None, axis=alt.Axis(labelLimit=130)
            ),
            yOffset=alt.YOffset("seed:O"),
            color=_colour(study, legend=None),
            shape=alt.Shape(
                "reached:N",
                scale=alt.Scale(
                    domain=["reached", "not reached so far"], range=["circle", "triangle-right"]
                ),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=tooltip,
        )
    )
    targets = ", ".join(f"{target:g}" for target in sorted({run.target_loss for run in study.runs}))
    caption = (
        f"One mark for each seed: the first step whose batch had a training loss of {targets} or less. A triangle stands at the last "
        "step of a run that never got there; its true number is larger."
    )
    chart = alt.layer(points).properties(width=300, height=max(60, 34 * len(study.variants)))
    return Figure("steps_to_loss", f"Steps to a training loss of {targets}", caption, [chart])


def gap(study: Study) -> Figure:
    """Returns by how much the test loss is above the training loss."""

    def differences(run: Run) -> tuple[np.ndarray, np.ndarray]:
        before = [
            run.train.loss[(run.train.step <= step) & (run.train.step > step - 10)]
            for step in run.test.step
        ]
        return run.test.step, run.test.loss - np.array(
            [losses.mean() if len(losses) else np.nan for losses in before]
        )

    rows = _bands(study, differences)
    caption = "Test loss minus the mean training loss of the last 10 batches before the evaluation. Above 0 and rising: overfitting."
    panels = (
        [_lines(study, rows, "test loss above training loss", _scale(rows), points=True)]
        if rows
        else []
    )
    return Figure("gap", "The gap between training and test", caption, panels)


def against_time(study: Study) -> Figure:
    """Returns loss and accuracy over the seconds of training."""

    def at_seconds(run: Run, curve: Curve, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = (
            np.isin(curve.step, run.train.step)
            if len(run.seconds)
            else np.zeros(len(curve.step), bool)
        )
        return run.seconds[
            np.searchsorted(run.train.step, curve.step[known])
        ] if known.any() else np.zeros(0), values[known]

    panels = []
    losses = _bands(study, lambda run: at_seconds(run, run.train, run.train.loss), every_run=True)
    accuracies = _bands(
        study, lambda run: at_seconds(run, run.test, run.test.accuracy), every_run=True
    )
    axis = alt.Axis(title="seconds of training")
    for rows, title, quantity in (
        (losses, "loss, training batches", "loss"),
        (accuracies, "accuracy, test images", "accuracy"),
    ):
        if rows:
            panels.append(
                _lines(
                    study,
                    rows,
                    title,
                    _scale(rows, log=quantity == "loss"),
                    points=quantity == "accuracy",
                    axis=axis,
                )
            )
    caption = "The first seed of each variant. Compilation in the first step counts; evaluations and checkpoints do not."
    return Figure("time", "Against time", caption, panels)


def chart_of(rows: list[Row]) -> alt.Chart:
    """Returns a chart that holds its data."""
    return alt.Chart(
        {"values": rows}
    )  # as a plain dict: an InlineData would be checked value by value


def _colour(study: Study, legend: Any) -> alt.Color:
    variants = list(study.variants)
    return alt.Color(
        "variant:N",
        scale=alt.Scale(domain=variants, range=_cycle(COLOURS, variants)),
        legend=legend,
    )


def _cycle(values: list[Any], variants: Sequence[str]) -> list[Any]:
    return [values[i % len(values)] for i in range(len(variants))]


def _bands(
    study: Study, points: Callable[[Run], tuple[np.ndarray, np.ndarray]], *, every_run: bool = False
) -> list[Row]:
    """Returns mean, lowest and highest value over a variant's seeds at each x; of the first seed alone where x is not shared."""
    rows = []
    for number, (variant, runs) in enumerate(study.variants.items()):
        found: dict[float, list[float]] = {}
        for run in runs[:1] if every_run else runs:
            for x, y in zip(*points(run), strict=True):
                if np.isfinite(y):
                    found.setdefault(float(x), []).append(float(y))
        places = sorted(found)
        window = -(-len(places) // MOST_POINTS)
        for i in range(0, len(places), window or 1):
            near = places[i : i + window]
            means = [float(np.mean(found[x])) for x in near]
            everything = [y for x in near for y in found[x]]
            numbers = {
                "x": near[-1],
                "mean": float(np.mean(means)),
                "low": min(everything),
                "high": max(everything),
            }
            names = {
                "variant": variant,
                "colour": COLOURS[number % len(COLOURS)],
                "shape": SHAPES[number % len(SHAPES)],
            }
            rows.append(names | {name: float(f"{value:.5g}") for name, value in numbers.items()})
    return rows


def _scale(rows: list[Row], *, log: bool = False) -> alt.Scale:
    low, high = min(row["low"] for row in rows), max(row["high"] for row in rows)
    if log and low > 0 and high > 5 * low:
        return alt.Scale(type="log", domain=[0.95 * low, 1.05 * high], nice=False)
    margin = 0.03 * (high - low) or 0.1
    return alt.Scale(domain=[low - margin, high + margin], nice=False, zero=False)


def _axis(scale: alt.Scale) -> alt.Axis:
    """Returns the axis of a scale; a logarithmic one has marks at 1, 2 and 5 times powers of ten only."""
    content = scale.to_dict()
    if content.get("type") != "log":
        return alt.Axis(title=None)
    low, high = content["domain"]
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    marks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    return alt.Axis(title=None, values=[mark for mark in marks if low <= mark <= high], format="~g")


def _lines(
    study: Study,
    rows: list[Row],
    title: str,
    scale: alt.Scale,
    *,
    points: bool,
    axis: alt.Axis = STEP,
) -> Panel:
    """Returns a line with a band for each variant; hovering shows the values of all at the nearest x."""
    variants = list(study.variants)
    columns = 2 if max(map(len, variants)) < 18 else 1
    style: dict[str, Any] = {
        "orient": "top",
        "columns": columns,
        "symbolType": "stroke",
        "symbolSize": 500,
        "labelLimit": 300,
    }
    legend = alt.Legend(title=None, **style) if len(variants) > 1 else None
    x, colour = (
        alt.X("x:Q", axis=axis, scale=alt.Scale(zero=True, nice=False)),
        _colour(study, legend),
    )
    fill, shape = (
        alt.Fill("colour:N", scale=None),
        alt.Shape("shape:N", scale=None),
    )  # as they are: the legend shows lines alone
    base = chart_of(rows)
    dash = alt.StrokeDash(
        "variant:N", scale=alt.Scale(domain=variants, range=_cycle(DASHES, variants)), legend=legend
    )
    y = alt.Y("mean:Q", scale=scale, axis=_axis(scale))
    layers: list[Any] = [
        base.mark_area(opacity=0.16).encode(
            x=x, y=alt.Y("low:Q", scale=scale, axis=_axis(scale)), y2="high:Q", fill=fill
        ),
        base.mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, strokeDash=dash),
    ]
    if points:
        layers.append(
            base.mark_point(filled=True, size=40, opacity=1).encode(
                x=x, y=y, color=colour, shape=shape
            )
        )
    nearest = alt.selection_point(
        name=re.sub(r"\W", "_", title),
        on="pointerover",
        nearest=True,
        fields=["x"],
        empty=False,
        clear="pointerout",
    )
    # Vega-Lite looks for the text in the cell around the nearest point, which holds that point as its `datum`.
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
    """Returns what hovering says at each x: mean, lowest and highest value of each variant, "v0" for the first."""
    said: dict[float, Row] = {}
    for row in rows:
        spread = f" ({row['low']:.4g} to {row['high']:.4g})" if row["low"] < row["high"] else ""
        here = said.setdefault(
            row["x"], {"x": row["x"], **{f"v{i}": "—" for i in range(len(variants))}}
        )
        here[f"v{variants.index(row['variant'])}"] = f"{row['mean']:.4g}{spread}"
    return [said[x] for x in sorted(said)]
