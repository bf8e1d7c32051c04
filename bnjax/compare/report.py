"""One report about many runs, from their folders alone, without JAX."""

import dataclasses
import functools
import io
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import numpy as np
import tqdm
import vl_convert
from PIL import Image

from bnjax.compare import claims, intervals, runs
from bnjax.compare.runs import Curve, Run, Study, command, read_study
from bnjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, with a caption that says how it was made."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


def verdict_table(study: Study) -> Table | None:
    """Returns the verdict on each statement of the comparisons, None if nothing was claimed."""
    rows, methods = [], set()
    for folder in study.comparisons:
        try:
            comparison = claims.read(folder)
            found = claims.verdicts(comparison, runs.finished_runs(folder, comparison))
        except UserError as error:
            rows.append([str(folder), "—", "not known", "—", str(error), "—"])
            continue
        question = f"{comparison['question']} ({comparison['size']} size)"
        for verdict in found:
            effect, statement = verdict.effect, verdict.statement
            said = f"{effect}, {effect.n} pairs" if effect else "—"
            said += "" if verdict.logrank is None else f"; log-rank test p = {verdict.logrank:.2g}"
            claim, source = str(statement), statement.source
            rows.append([question, claim, verdict.outcome, said, verdict.reason, source])
            methods |= {effect.method} if effect else set()
    if not rows:
        return None
    caption = (
        "Of 95 % intervals one in twenty is expected to miss. "
        f"Found: {'; '.join(sorted(methods)) or 'nothing'}."
    )
    columns = ["question", "claim", "verdict", "found", "because", "source"]
    return Table("Verdicts", columns, rows, caption)


def results(study: Study) -> Table:
    """Returns what each variant came to."""
    targets = sorted({run.target_loss for run in study.runs})
    rows = []
    for variant, siblings in study.variants.items():
        whole = [run for run in siblings if run.summary]
        counted = whole or siblings
        tests = [run.test for run in counted if len(run.test.step)]
        known = [test.loss for test in tests if not np.isnan(test.loss).all()]
        number, total = len(whole), len(siblings)
        row = {
            "variant": variant,
            "runs": f"{number}" if number == total else f"{number} of {total} finished",
            "steps": _list(sorted({int(run.train.step[-1]) for run in counted})),
            "final test accuracy": _mean([test.accuracy[-1] for test in tests], 4),
            "final test loss": _mean([test.loss[-1] for test in tests], 3),
            "best test accuracy": _mean([test.accuracy.max() for test in tests], 4),
            "best test loss": _mean([np.nanmin(losses) for losses in known], 3),
            "final training loss": _mean([run.train.loss[-1] for run in counted], 4),
            f"steps to training loss {_list(targets)}": _reached(counted),
        }
        rows.append(row)
    caption = (
        "Mean over the seeds ± half of its 95 % interval by Student's t. Where runs of a variant "
        "are finished, the others do not count. The best is each run's own, over all its "
        "evaluations: it is chosen on the test images. Steps to a loss: the Kaplan-Meier median."
    )
    return Table("Results", [*rows[0]], [[*row.values()] for row in rows], caption)


def speed(study: Study) -> Table:
    """Returns how long training took, and on what."""
    rows = []
    for variant, siblings in study.variants.items():
        seconds = [[*run.seconds.values()][-1] for run in siblings if run.seconds]
        rates = [rate for run in siblings if (rate := _rate(run))]
        devices = {str(run.summary.get("device", "not known yet")) for run in siblings}
        rows.append([variant, _mean(seconds, 1), _mean(rates, 0), _list(sorted(devices))])
    caption = (
        "Of training, without compiling, evaluations and checkpoints. "
        "Images a second: the median step of each run, its first left out."
    )
    return Table("Time", ["variant", "seconds", "images a second", "device"], rows, caption)


def origins(study: Study) -> Table:
    """Returns data, versions and revisions: what has to be the same for the same result."""
    rows = []
    for variant, siblings in study.variants.items():
        summaries = [run.summary for run in siblings if run.summary]
        found = (
            {pixels(run) for run in siblings},
            {" ".join(f"{k} {v}" for k, v in summary["versions"].items()) for summary in summaries},
            {str(summary["git"]) for summary in summaries if summary.get("git")},
        )
        rows.append([variant, *(_list(sorted(values)) for values in found)])
    return Table("Data and versions", ["variant", "data", "versions", "revision"], rows)


def pixels(run: Run) -> str:
    """Returns which images a run saw."""
    official, words = run.summary.get("official_pixels"), ""
    if isinstance(official, bool):
        words = f",{'' if official else ' not'} the official pixels"
    if reason := run.summary.get("fallback_reason"):
        words += f" (in place of {run.config['config.data.name']}: {reason})"
    return f"{run.dataset}{words}"


def differences(study: Study) -> Table:
    """Returns the keys of the configs that are not the same for all variants."""
    configs = {variant: siblings[0].config for variant, siblings in study.variants.items()}
    rows = []
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        values = [config.get(key) for config in configs.values()]
        if key != "config.seed" and len({repr(value) for value in values}) > 1:
            rows.append([key.removeprefix("config."), *map(_plain, values)])
    return Table("What differs between the variants", ["key", *configs], rows)


def whole_config(study: Study) -> Table:
    """Returns all keys of the first run's config."""
    run = study.runs[0]
    rows = [[key.removeprefix("config."), _plain(value)] for key, value in run.config.items()]
    return Table(f"The whole config of {run.variant}", ["key", "value"], rows)


def commands(study: Study) -> list[str]:
    """Returns the commands that make these runs again: a comparison's own, or one for each run."""
    own = {
        folder: content["command"]
        for folder, content in study.comparisons.items()
        if isinstance(content.get("command"), str)
    }
    others = [run for run in study.runs if run.folder.parent.parent not in own]
    lines = [shlex.join([*command(run), "--workdir", str(run.folder)]) for run in others]
    return [*own.values(), *lines]


def _rate(run: Run) -> float:
    """Returns the images a second of the median step; 0 if there are too few steps."""
    laps = np.diff([*run.seconds.values()])
    batch = run.summary.get("batch_size") or run.config["config.train.batch_size"]
    return float(batch / np.median(laps)) if len(laps) and np.median(laps) > 0 else 0.0


def _mean(values: Sequence[float], digits: int) -> str:
    if not len(values):
        return "—"
    found = intervals.mean([float(value) for value in values])
    half = "" if found.n < 2 else f" ± {found.high - found.value:,.{digits}f}"
    return f"{found.value:,.{digits}f}{half}"


def _reached(counted: Sequence[Run]) -> str:
    """Returns the Kaplan-Meier median of the steps to the target loss."""
    found = [runs.time(run, "steps_to_loss", run.target_loss) for run in counted]
    times = intervals.Times(*map(tuple, zip(*found, strict=True)))
    middle, there = intervals.median(times).value, sum(times.reached)
    text = f"{middle:g}" if middle < float("inf") else "not reached"
    return text if there in (0, len(found)) else f"{text} ({there} of {len(found)} got there)"


def _plain(value: Any) -> str:
    if value is None:
        return "—"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) or "''"


def _list(values: Sequence[Any]) -> str:
    words = (f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return "; ".join(words) or "not known yet"


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


WORDS = {
    "mean": "mean, standard deviations off",
    "variance": "variance, log(stored / true)",
}


def averages_figures(study: Study) -> Iterator[Figure]:
    """Yields the cost for all variants, and the drift of each norm for the first seed of each."""
    yield _cost(study)
    for variant, its_runs in study.variants.items():
        run = next((run for run in its_runs if run.gaps), None)
        if run is None:
            continue
        caption = (
            "Of each norm, the stored mean and variance beside those of the same training images "
            "at the same weights; 0 is right. A variance above 0 makes the norm's output too small "
            "in evaluation, one below 0 too large."
        )
        heading = f"Drift of the running averages: {variant}, seed {run.seed}"
        panels = [_drift(run, of) for of in WORDS]
        yield Figure(file_name(variant, "drift"), heading, caption, panels, details=True)


def _cost(study: Study) -> Figure:
    panels = []
    for key, sign in (("loss", 1), ("accuracy", -1)):

        def at_steps(run: Run, key: str = key, sign: int = sign) -> Points:
            steps = np.array([line["step"] for line in run.gaps], int)
            pairs = [(line[key], line[f"batch_{key}"]) for line in run.gaps]
            apart = [np.nan if None in pair else sign * (pair[0] - pair[1]) for pair in pairs]
            return steps, np.array(apart, float)

        if rows := bands(study, at_steps):
            title = f"{key} lost by the stored statistics"
            panels.append(lines(study, rows, title, axis_scale(rows), points=True))
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


MAX_COLUMNS = 12  # evaluations in a picture of histograms
MAX_LAYERS = 16


def inside_figures(study: Study) -> Iterator[Figure]:
    """Yields what went on inside the network of the first seed of each variant."""
    words = {
        "mean": ("running mean", "The running mean of the channels"),
        "var": ("running variance", "The running variance of the channels"),
    }
    for variant, its_runs in study.variants.items():
        run = next((run for run in its_runs if run.histograms), None)
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
        curves(study),
        steps_to_loss(study),
        gap(study),
        *averages_figures(study),
        against_time(study),
        *inside_figures(study),
    )
    shown = [figure for figure in drawn if figure.panels]
    specs, places = _specs(shown)
    verdicts = verdict_table(study)
    common = {
        "mark": MARK,
        "title": _title(study),
        "lead": _lead(study),
        "problems": study.problems,
        "tables_first": [*([verdicts] if verdicts else []), results(study)],
        "tables_last": [speed(study), differences(study), origins(study)],
        "figures": shown,
        "commands": commands(study),
        "config": whole_config(study),
    }
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    pictures = {}
    for figure in tqdm.tqdm(
        shown, unit="picture", disable=not sys.stderr.isatty(), dynamic_ncols=True
    ):
        pictures[figure.name] = f"{PICTURES}/{figure.name}.png"
        (out / pictures[figure.name]).write_bytes(_png(figure))
    text = _template("report.md").render(**common, pictures=pictures)
    (out / "report.md").write_text(text, encoding="utf-8")
    page = _template("report.html").render(**common, specs=specs, places=places, library=_library())
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
        loader=jinja2.PackageLoader("bnjax.compare", "."),
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
    data = " and ".join(sorted({pixels(run) for run in study.runs}))
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


MARK = "<!-- made by bnjax.report -->"  # at the top of what is written


def write(folder: Path) -> Path:
    """Writes the report about a run or a comparison into its folder; returns report.html's path.

    Raises:
        UserError: if nothing there can be reported.
    """
    page, _ = write_all([folder], folder)
    return page


def write_all(folders: list[Path], out: Path) -> tuple[Path, list[str]]:
    """Writes `report.html`, one file that needs nothing else; returns its path, and its problems.

    Beside it are `report.md` and its pictures in `report_files`. Problems, of folders that could
    not be read for instance, are in the report too.

    Args:
        folders: of runs and of comparisons.
        out: the folder to write into, created if need be.

    Raises:
        UserError: if nothing there can be reported, `out` cannot be written or has a report of
            somebody else's.
    """
    study = read_study(folders)
    _check_ours(out)
    return write_page(study, out), study.problems


def _check_ours(out: Path) -> None:
    """Checks that nothing but an earlier report will be overwritten."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file in (out / "report.html", out / "report.md"):
            if (
                file.exists()
                and MARK not in file.read_text(encoding="utf-8", errors="replace")[:200]
            ):
                raise UserError(
                    f"{file} was not made by bnjax.report, and is not overwritten. "
                    "Choose another folder with --out."
                )
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}. Choose another folder with --out."
        ) from error
