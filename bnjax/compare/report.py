"""Writes one report on many runs from their folders. Does not import JAX."""

import dataclasses
import io
import json
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import numpy as np
import vl_convert
from PIL import Image

from bnjax.compare import claims, intervals, runs
from bnjax.compare.runs import Run, Study
from bnjax.errors import UserError
from bnjax.text import progress

MARK = "<!-- made by bnjax.report -->"  # the first line of each report
PICTURES = "report_files"
VERSION = alt.SCHEMA_VERSION.removeprefix("v").rpartition(".")[0]  # of Vega-Lite
MAX_POINTS = 300  # per curve
MAX_COLUMNS = 12  # evaluations per picture of histograms
MAX_LAYERS = 16

# Variants differ in hue, dash pattern and marker, so they are also distinct in greyscale.
COLOURS = ["#2a78b5", "#d55e00", "#1a9873", "#b8579a", "#c58a00", "#6a7be0", "#7f7f7f", "#a3562a"]
STYLE: dict[str, Any] = {
    "background": "white",
    "font": "sans-serif",
    "range": {"category": COLOURS},
    "view": {"stroke": None},
    "title": {"fontSize": 13, "anchor": "start", "fontWeight": 600},
    "axis": {"gridColor": "#808080", "gridOpacity": 0.25, "titleFontWeight": "normal"},
    "legend": {"labelFontSize": 12},
}
STEP = alt.Axis(tickMinStep=1)
DATA: Any = {"content": "data"}  # shows all values of a row as a tooltip

Row = dict[str, Any]
Panel = Any  # an Altair chart of any kind
Points = tuple[np.ndarray, np.ndarray]  # x and y


def write(folders: Sequence[Path], out: Path) -> tuple[Path, list[str]]:
    """Writes a self-contained `report.html`; returns its path and the problems found in the runs.

    Also writes `report.md`, with its pictures in `report_files`. Both reports list the problems,
    for instance unreadable runs.

    Args:
        folders: the folders of runs and comparisons.
        out: the output folder, created if needed.

    Raises:
        UserError: if there is no readable run, or a report already in `out` was not written by
            bnjax.
        OSError: if `out` cannot be written.
    """
    study = runs.read_study(folders)
    page, text = out / "report.html", out / "report.md"
    (out / PICTURES).mkdir(parents=True, exist_ok=True)
    for file in (page, text):
        if file.exists() and MARK not in file.read_text("utf-8", errors="replace")[:200]:
            raise UserError(
                f"{file} was not made by bnjax report, so it is not overwritten. Choose a "
                "different folder with --out."
            )
    figures = [
        curves(study),
        steps_to_loss(study),
        gap(study),
        *averages_figures(study),
        against_time(study),
        *inside_figures(study),
    ]
    figures = [figure for figure in figures if figure.panels]
    specs, style = {}, {**STYLE, "background": "transparent"}
    for figure in progress(figures, "drawing", "picture"):
        (out / PICTURES / f"{figure.name}.png").write_bytes(_png(figure))
        for number, panel in enumerate(figure.panels):
            spec = {**panel.to_dict(validate=False), "width": "container", "config": style}
            specs[f"{figure.name}-{number}"] = spec
    names, verdicts = list(study.variants), verdict_table(study)
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    counts = {"run": len(study.runs), "variant": len(names)}
    some = " of ".join(f"{n} {word}{'s' * (n > 1)}" for word, n in counts.items())
    data = " and ".join(sorted({pixels(run) for run in study.runs}))
    library = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VERSION)
    content = {
        "mark": MARK,
        "title": ", ".join(names[:3] if more else names) + more,
        "lead": f"{some}, trained on {data}.",
        "problems": study.problems,
        "tables_first": [one for one in (verdicts, results(study), effects(study)) if one],
        "figures": figures,
        "pictures": PICTURES,
        "tables_last": [speed(study), differences(study), origins(study)],
        "commands": commands(study),
        "config": whole_config(study),
        "library": str(library).replace("</script", "<\\/script"),
        # A variant's name may contain "</script>" or "<!--".
        "specs": json.dumps(specs, separators=(",", ":")).replace("<", "\\u003c"),
    }
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("bnjax.compare", "."),
        autoescape=jinja2.select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    for file in (text, page):
        file.write_text(templates.get_template(file.name).render(content), encoding="utf-8")
    return page, study.problems


# The tables.


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, with a caption that describes the method."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


def verdict_table(study: Study) -> Table | None:
    """Returns the verdict on each statement in the comparisons; None without statements."""
    rows, methods = [], set()
    for comparison, finished in study.comparisons.values():
        question = f"{comparison['question']} ({comparison['size']} size)"
        for verdict in claims.verdicts(comparison, finished):
            effect, statement = verdict.effect, verdict.statement
            said = f"{effect}, {effect.n} pairs" if effect else "—"
            said += "" if verdict.logrank is None else f"; log-rank test p = {verdict.logrank:.2g}"
            claim, source = str(statement), statement.source
            rows.append([question, claim, verdict.outcome, said, verdict.reason, source])
            methods |= {effect.method} if effect else set()
    if not rows:
        return None
    caption = (
        "One in twenty 95 % intervals is expected to miss the true value. "
        f'The column "found" shows: {"; ".join(sorted(methods)) or "nothing"}.'
    )
    columns = ["question", "claim", "verdict", "found", "because", "source"]
    return Table("Verdicts", columns, rows, caption)


def results(study: Study) -> Table:
    """Returns the accuracies, losses and numbers of steps of each variant."""
    chosen_by = study.chosen_by
    columns: dict[str, tuple[str, str, int]] = {
        "final test accuracy": ("test_accuracy", "last", 4),
        "final test loss": ("test_loss", "last", 3),
        f"best {chosen_by} accuracy": ("judged_accuracy", "best", 4),
        f"best {chosen_by} loss": ("judged_loss", "best", 3),
        "final training loss": ("train_loss", "last", 4),
    }
    rows = []
    for variant, siblings in study.variants.items():
        finished = [run for run in siblings if run.summary]
        counted, number = finished or siblings, f"{len(finished)}"
        times = runs.times(counted, "steps_to_loss", counted[0].target_loss)
        median, there = intervals.median(times).value, sum(times.reached)
        to_loss = f"{median:g}" if median < float("inf") else "not reached"
        if 0 < there < len(counted):
            to_loss += f" ({there} of {len(counted)} reached it)"
        means = [
            _mean([runs.value(run, quantity, at) for run in counted], digits, quantity)
            for quantity, at, digits in columns.values()
        ]
        number += "" if len(finished) == len(siblings) else f" of {len(siblings)} finished"
        steps = _list({run.last_step for run in counted})
        rows.append([variant, number, steps, *means, to_loss])
    caption = (
        "Values are means over the seeds [95 % intervals by Student's t; for accuracies, on the "
        "logit scale]. If a variant has finished runs, its unfinished runs are excluded. A best "
        f"value is the best over all evaluations of a run on the {chosen_by} images. The steps to "
        "a loss are Kaplan-Meier medians."
    )
    targets = _list({run.target_loss for run in study.runs})
    head = ["variant", "runs", "steps", *columns, f"steps to training loss {targets}"]
    return Table("Results", head, rows, caption)


def effects(study: Study) -> Table | None:
    """Returns the differences in comparisons that make no statements; None without any."""
    rows = [
        [name, f"{effect}", f"{effect.n}"]
        for comparison, finished in study.comparisons.values()
        if not comparison["statements"]
        for name, effect in claims.effects(comparison, finished).items()
    ]
    caption = "The mean of the differences at equal seeds [95 % t interval]."
    columns = ["variants", "difference in final test accuracy", "pairs of runs"]
    return Table("Differences in test accuracy", columns, rows, caption) if rows else None


def speed(study: Study) -> Table:
    """Returns training times, speeds and devices."""
    rows = []
    for variant, siblings in study.variants.items():
        timed = [run for run in siblings if len(run.seconds) > 1]
        seconds = [max(run.seconds.values()) for run in timed]
        laps = [max(np.median(np.diff([*run.seconds.values()])), 1e-3) for run in timed]
        rates = [
            run.config["config.train.batch_size"] / lap
            for run, lap in zip(timed, laps, strict=True)
        ]
        devices = {str(run.summary.get("device", "not known yet")) for run in siblings}
        rows.append([variant, _mean(seconds, 1), _mean(rates, 0), _list(devices)])
    caption = (
        "The seconds are those of training, without compilation, evaluations and checkpoints. "
        "Images per second are computed from the median time of a step, without the first step."
    )
    return Table("Time", ["variant", "seconds", "images per second", "device"], rows, caption)


def origins(study: Study) -> Table:
    """Returns the data sets, package versions and git revisions."""
    rows = []
    for variant, siblings in study.variants.items():
        summaries = [run.summary for run in siblings if run.summary]
        found = (
            {pixels(run) for run in siblings},
            {" ".join(f"{k} {v}" for k, v in summary["versions"].items()) for summary in summaries},
            {str(summary["git"]) for summary in summaries if summary["git"]},
        )
        rows.append([variant, *map(_list, found)])
    return Table("Data and versions", ["variant", "data", "versions", "revision"], rows)


def pixels(run: Run) -> str:
    """Returns a description of a run's data set."""
    official, words = run.summary.get("official_pixels"), ""
    if official is not None:
        words = f",{'' if official else ' not'} the official pixels"
    if reason := run.summary.get("fallback_reason"):
        words += f" (in place of {run.config['config.data.name']}: {reason})"
    return f"{run.data.label}{words}"


def differences(study: Study) -> Table:
    """Returns the config keys whose values differ between variants."""
    configs = {variant: siblings[0].config for variant, siblings in study.variants.items()}
    rows = []
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        values = [_plain(config.get(key, "—")) for config in configs.values()]
        if key != "config.seed" and len({*values}) > 1:
            rows.append([key.removeprefix("config."), *values])
    return Table("Differences between the variants", ["key", *configs], rows)


def whole_config(study: Study) -> Table:
    """Returns all keys and values of the first run's config."""
    (variant, (run, *_)), *_ = study.variants.items()
    rows = [[key.removeprefix("config."), _plain(value)] for key, value in run.config.items()]
    return Table(f"The whole config of {variant}", ["key", "value"], rows)


def commands(study: Study) -> list[str]:
    """Returns the commands that repeat each comparison and each single run."""
    others = [run for run in study.runs if run.folder.parent.parent not in study.comparisons]
    lines = [shlex.join([*runs.command(run), "--workdir", str(run.folder)]) for run in others]
    return [*(comparison["command"] for comparison, _ in study.comparisons.values()), *lines]


def _mean(values: Sequence[float | None], digits: int, quantity: str = "") -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "—"
    of_accuracies = quantity.endswith("accuracy")
    found = intervals.mean_accuracy(known) if of_accuracies else intervals.mean(known)
    value, low, high = (f"{one:,.{digits}f}" for one in (found.value, found.low, found.high))
    return value if found.n < 2 else f"{value} [{low} to {high}]"


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) or "''"


def _list(values: set[Any]) -> str:
    words = (f"{value:g}" if isinstance(value, float) else str(value) for value in sorted(values))
    return "; ".join(words) or "not known yet"


# The figures.


@dataclasses.dataclass(frozen=True)
class Figure:
    """A group of charts with a caption.

    Attributes:
        name: the name of the picture file.
        title, caption: the text above and below the charts.
        panels: the charts, 300 pixels wide.
        details: whether the figure is initially collapsed on the page.
    """

    name: str
    title: str
    caption: str
    panels: list[Panel]
    details: bool = False


def curves(study: Study) -> Figure:
    """Returns loss and accuracy in training and evaluation, with all variants in one chart."""
    chosen_by = study.chosen_by
    panels = []
    for quantity in ("loss", "accuracy"):
        train, test = (_curves(study, split, quantity) for split in ("train", "judged"))
        scale = _scale(train + test, log=quantity == "loss")
        for rows, what in ((train, "training batches"), (test, f"{chosen_by} images")):
            title = f"{quantity}, {what}"
            panels += lines(study.variants, rows, title, scale, markers=rows is test)
    caption = (
        "Lines show the mean over the seeds, and bands the range from the lowest to the highest "
        "value. The training loss is the loss of each batch before its step, and "
        f"{chosen_by} images are evaluated after a step. Curves with more than {MAX_POINTS} steps "
        "are averaged over neighbouring steps; their bands contain all values of these steps."
    )
    return Figure("curves", "Loss and accuracy", caption, panels)


def steps_to_loss(study: Study) -> Figure:
    """Returns the step at which each run reached the target loss, or its last step."""
    states = ["reached", "not reached so far"]
    rows = []
    for variant, siblings in study.variants.items():
        times = runs.times(siblings, "steps_to_loss", siblings[0].target_loss)
        for run, step, reached in zip(siblings, times.values, times.reached, strict=True):
            found = {"step": step, "reached": states[not reached]}
            rows.append({"variant": variant, "seed": run.seed, **found})
    names = list(study.variants)
    shapes = alt.Scale(domain=states, range=["circle", "triangle-right"])
    legend = alt.Legend(title=None, orient="top")
    base = _chart(rows).mark_point(size=90, filled=True, tooltip=DATA)
    chart = base.encode(
        x=alt.X("step:Q", axis=STEP),
        y=alt.Y("variant:N", sort=names, title=None, axis=alt.Axis(labelLimit=130)),
        yOffset="seed:O",
        color=alt.Color("variant:N", scale=alt.Scale(domain=names), legend=None),
        shape=alt.Shape("reached:N", scale=shapes, legend=legend),
    ).properties(width=300, height=max(60, 34 * len(names)))
    targets = _list({run.target_loss for run in study.runs})
    caption = (
        f"Each mark is one seed, at the first step with a training loss of {targets} or less. A "
        "triangle marks the last step of a run that has not reached this loss."
    )
    return Figure("steps_to_loss", f"Steps to a training loss of {targets}", caption, [chart])


def gap(study: Study) -> Figure:
    """Returns the difference between test and training loss."""

    def apart(run: Run) -> Points:
        train, test = run.curve("train"), run.curve("test")
        windows = [(train.step <= step) & (train.step > step - 10) for step in test.step]
        return test.step, test.loss - np.array([train.loss[near].mean() for near in windows])

    caption = (
        "The gap is the test loss minus the mean training loss of the last 10 batches before the "
        "evaluation. If this gap rises, the network overfits or its running statistics get worse."
    )
    panels = lines(study.variants, bands(study, apart), "test loss minus training loss")
    return Figure("gap", "The gap between training and test", caption, panels)


def against_time(study: Study) -> Figure:
    """Returns loss and accuracy against the training time in seconds."""
    # The times differ between runs, so they cannot be averaged per step.
    first = {variant: siblings[:1] for variant, siblings in study.variants.items()}
    study = dataclasses.replace(study, variants=first)
    loss, accuracy = (
        _curves(study, *of, "seconds") for of in (("train", "loss"), ("judged", "accuracy"))
    )
    chosen_by = study.chosen_by
    scale = _scale(loss, log=True)
    panels = lines(first, loss, "loss, training batches", scale, x="seconds", markers=False)
    panels += lines(first, accuracy, f"accuracy, {chosen_by} images", x="seconds")
    caption = (
        "The charts show the first seed of each variant. The time does not include compilation, "
        "evaluations and checkpoints."
    )
    return Figure("time", "Against time", caption, panels)


def averages_figures(study: Study) -> Iterator[Figure]:
    """Yields the cost of the running averages, and the drift for each variant's first seed."""
    panels = []
    for key, sign, title in (
        ("loss", 1, "increase of the loss"),
        ("accuracy", -1, "decrease of the accuracy"),
    ):

        def lost(run: Run, key: str = key, sign: int = sign) -> Points:
            stored, own = (
                np.array([line[name] for line in run.gaps], float) for name in (key, f"batch_{key}")
            )
            return np.array([line["step"] for line in run.gaps], int), sign * (stored - own)

        panels += lines(study.variants, bands(study, lost), title)
    caption = (
        "The same training images are evaluated with the running averages and with batch "
        "statistics. The charts show how much the running averages increase the loss and decrease "
        "the accuracy. If both changes are near 0, any gap between training and test has a "
        "different cause."
    )
    yield Figure("averages", "The cost of the running averages", caption, panels)
    words = {
        "drift_mean": "error of the mean, in standard deviations",
        "drift_variance": "variance, log(stored / true)",
    }
    for variant, siblings in study.variants.items():
        if run := next((run for run in siblings if run.gaps), None):
            panels = []
            for key, title in words.items():
                rows = [
                    {"variant": norm, "step": line["step"], "value": value}
                    for line in run.gaps
                    for norm, value in line[key].items()
                    if value is not None
                ]
                panels += lines(dict.fromkeys(row["variant"] for row in rows), rows, title)
            caption = (
                "The stored mean and variance of each norm, compared with the statistics of a "
                "batch of training images at the same weights; 0 is correct. If the "
                "variance is above 0, the output of the norm is too small in evaluation; below 0, "
                "too large."
            )
            heading = f"Drift of the running averages: {variant}, seed {run.seed}"
            yield Figure(_file_name("drift", variant), heading, caption, panels, details=True)


def inside_figures(study: Study) -> Iterator[Figure]:
    """Yields running statistics, activations and gradients for each variant's first seed."""
    for variant, siblings in study.variants.items():
        run = next((run for run in siblings if run.histograms), None)
        if run is None:
            continue
        of = f"{variant}, seed {run.seed}"
        for leaf, title in (("mean", "running mean"), ("var", "running variance")):
            names = _names(run, "statistic", f".{leaf}")
            panels = [panel for name in names for panel in _fan(run, name)]
            caption = (
                f"The distribution of the {title} over the channels. The line is the median, the "
                "dark band the middle half, and the light band the range from 5 to 95 %."
            )
            heading = f"{title.capitalize()}: {of}"
            yield Figure(_file_name(title, variant), heading, caption, panels, details=True)
        for kind, end, sentence in (
            ("activation", "", "Outputs of each layer"),
            (
                "gradient",
                ".kernel",
                "Gradients of the mean loss with respect to each layer's kernel",
            ),
        ):
            panels = [_heat(run, kind, name) for name in _names(run, kind, end)]
            caption = (
                f"{sentence}, on a fixed small batch of training images. A stronger colour means "
                "more values; each column adds up to 100 %. Values outside the range (at most "
                "1 % of a column) are counted at its ends."
            )
            heading = f"{kind.capitalize()}s: {of}"
            yield Figure(_file_name(kind, variant), heading, caption, panels, details=True)


def _file_name(title: str, variant: str) -> str:
    return re.sub(r"[^\w.-]+", "_", f"{title}_{variant}")


def _names(run: Run, kind: str, end: str = "") -> list[str]:
    """Returns the names of at most `MAX_LAYERS` histograms, evenly spaced over the network."""
    every = dict.fromkeys(name for line in run.histograms for name in line[kind])
    names = [name for name in every if name.endswith(end)]
    count = min(len(names), MAX_LAYERS)
    return [names[i * len(names) // count] for i in range(count)]


def _fan(run: Run, name: str) -> list[Panel]:
    keys = ("low", "lower", "value", "upper", "high")
    rows = []
    for line in run.histograms:
        if numbers := line["statistic"].get(name):
            few = dict(zip(keys, numbers["quantiles"][2:7], strict=True))
            rows.append({"variant": "median", "step": line["step"], **few})
    return lines(["median"], rows, name.rpartition(".")[0], height=130)


def _heat(run: Run, kind: str, name: str) -> Panel:
    """Returns a heat map with one column of bins for each of up to `MAX_COLUMNS` evaluations."""
    found = [line for line in run.histograms if name in line[kind]]
    count = min(len(found), MAX_COLUMNS)
    rows = []
    for line in (found[(i + 1) * len(found) // count - 1] for i in range(count)):
        numbers = line[kind][name]
        edges = np.linspace(numbers["low"], numbers["high"], len(numbers["counts"]) + 1)
        shares = np.array(numbers["counts"]) / sum(numbers["counts"])
        for low, high, share in zip(edges[:-1], edges[1:], shares, strict=True):
            if share:
                bin_ = _rounded({"low": low, "high": high, "share": share})
                rows.append({"step": line["step"], **bin_})
    shades = alt.Scale(type="sqrt", domainMin=0, range=[0, 1])
    return (
        _chart(rows)
        .mark_rect(color=COLOURS[0], tooltip=DATA)
        .encode(
            x=alt.X("step:O", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("low:Q", title=None, axis=alt.Axis(format="~g", tickCount=5)),
            y2="high:Q",
            opacity=alt.Opacity("share:Q", scale=shades, legend=None),
        )
        .properties(width=300, height=130, title=name)
    )


def _chart(rows: list[Row]) -> alt.Chart:
    # A plain dict, because Altair would validate each value of an InlineData.
    return alt.Chart({"values": rows})


def _curves(study: Study, split: str, quantity: str, x: str = "step") -> list[Row]:
    def points(run: Run) -> Points:
        curve = run.curve(split)
        seconds = [run.seconds.get(step, np.nan) for step in curve.step.tolist()]
        return curve.step if x == "step" else np.array(seconds), getattr(curve, quantity)

    return bands(study, points, x)


def bands(study: Study, points: Callable[[Run], Points], x: str = "step") -> list[Row]:
    """Returns the mean, minimum and maximum over the seeds of each variant at each x."""
    rows = []
    for variant, siblings in study.variants.items():
        found: dict[float, list[float]] = {}
        for run in siblings:
            for at, y in zip(*points(run), strict=True):
                if np.isfinite([at, y]).all():
                    found.setdefault(float(at), []).append(float(y))
        places = sorted(found)
        window = max(1, -(-len(places) // MAX_POINTS))
        for i in range(0, len(places), window):
            near = places[i : i + window]
            values = [y for at in near for y in found[at]]
            band = {"value": np.mean(values), "low": min(values), "high": max(values)}
            rows.append({"variant": variant, **_rounded({x: near[-1], **band})})
    return rows


def _rounded(row: Row) -> Row:
    return {key: float(f"{value:.5g}") for key, value in row.items()}


def _scale(rows: list[Row], *, log: bool = False) -> alt.Scale:
    """Returns a scale that contains the bands; logarithmic if they span a factor above 5."""
    ends = [row[end] for row in rows for end in ("low", "high")] or [0.0]
    kind: Any = "log" if log and 0 < 5 * min(ends) < max(ends) else "linear"
    return alt.Scale(type=kind, domain=[min(ends), max(ends)], nice=kind == "linear", zero=False)


def lines(
    variants: Iterable[str],
    rows: list[Row],
    title: str,
    scale: alt.Scale | None = None,
    *,
    x: str = "step",
    markers: bool = True,
    height: int = 230,
) -> list[Panel]:
    """Returns a list with one chart that has a line for each variant; without rows, an empty list.

    Each row has the keys `variant`, `value` and the value of `x`. Optional keys are `low` and
    `high`, the ends of a light band, and `lower` and `upper`, the ends of a dark band.
    """
    if not rows:
        return []
    names = list(variants)
    style: Any = {"symbolType": "stroke", "symbolSize": 500, "symbolOpacity": 1}
    legend = alt.Legend(title=None, orient="top", columns=2, labelLimit=300, **style)
    scheme: Any = {"scale": alt.Scale(domain=names), "legend": legend if len(names) > 1 else None}
    colour = alt.Color("variant:N", **scheme)
    axis = STEP if x == "step" else alt.Axis(title="seconds of training")
    at = alt.X(f"{x}:Q", axis=axis, scale=alt.Scale(zero=True, nice=False))
    base = _chart(rows).encode(x=at, color=colour)
    scale = scale or alt.Scale(zero=False)
    layers = [
        base.mark_area(opacity=opacity).encode(y=alt.Y(f"{low}:Q", scale=scale), y2=f"{high}:Q")
        for low, high, opacity in (("low", "high", 0.16), ("lower", "upper", 0.3))
        if low in rows[0]
    ]
    line = base.encode(y=alt.Y("value:Q", scale=scale, title=None))
    dash = alt.StrokeDash("variant:N", **scheme)
    shape = alt.Shape("variant:N", **{**scheme, "legend": None})
    layers.append(line.mark_line(strokeWidth=2).encode(strokeDash=dash))
    points = line.mark_point(filled=True, size=40, opacity=float(markers), tooltip=DATA)
    chart = alt.layer(*layers, points.encode(shape=shape)).resolve_legend(shape="independent")
    return [chart.properties(width=300, height=height, title=title)]


def _png(figure: Figure) -> bytes:
    """Returns the panels of a figure as a PNG with a white background.

    A palette of 128 colours makes the file ten times smaller.
    """
    columns = 1 if len(figure.panels) == 1 else 2 if len(figure.panels) <= 4 else 3
    spec = {**alt.concat(*figure.panels, columns=columns).to_dict(validate=False), "config": STYLE}
    png = vl_convert.vegalite_to_png(spec, vl_version=VERSION, scale=1.5)
    picture, small = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    picture.quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()
