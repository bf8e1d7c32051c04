"""`bnjax audit`: what is wrong with the running statistics of a trained network."""

import functools
import html
import json as json_
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from bnjax.commands import Checkpoint, DataDir, Json, Workdir
from bnjax.errors import UserError

if TYPE_CHECKING:
    from bnjax.clinic import Findings
    from bnjax.data.batches import Examples
    from bnjax.types import Batch

LEAST_BATCHES = 4  # to see how much batches differ
LEAST_IMAGES = 2048
ILL, HEALTHY = "#d55e00", "#2a78b5"
TITLES = {
    "drifts": "stored minus expected mean, in standard deviations",
    "log_ratios": "log of stored over expected variance",
}


def run(
    workdir: Workdir,
    checkpoint: Checkpoint = "last",
    data_dir: DataDir = None,
    images: Annotated[
        int | None,
        arg(metavar="N", help="how many training images; four batches, and 2,048 at least"),
    ] = None,
    json: Json = False,
    out: Annotated[
        Path | None,
        arg(metavar="DIR", help="also write audit.html, with a chart, into this folder"),
    ] = None,
) -> int:
    """Find what is wrong with the running statistics of a trained network, and why.

    Exits with 0 if nothing was found, 1 if something was, and 2 if there was nothing to audit.
    """
    if images is not None and images < 8:
        raise UserError(f"--images {images} is too few: give 8 or above.")
    import jax

    from bnjax.clinic import Run, audit
    from bnjax.commands.report import reports
    from bnjax.train.cpu import compiler_options, prepare
    from bnjax.train.optimizers import optimizer
    from bnjax.train.trained import Trained
    from bnjax.train_step import forward

    prepare()
    try:
        if out:
            reports()  # before the audit takes its time
            out.mkdir(parents=True, exist_ok=True)
        trained = Trained(workdir, checkpoint)
        batch_size = trained.config.train.batch_size
        batches = audit_batches(trained.dataset(data_dir).train, batch_size, images)
        options = compiler_options(len(batches[0]["image"]))
        jit = functools.partial(jax.jit, compiler_options=options)
        evaluate = jit(functools.partial(forward, model=trained.model, train=False))

        def predict(images: Any) -> Any:
            return evaluate(trained.params, trained.batch_stats, {"image": images})[0]

        known = Run(
            steps=trained.step,
            batch_size=batch_size,
            weights=trained.weights,
            tx=optimizer(trained.config, max(trained.step, 1)),
            predict=predict,
        )
        findings = audit(trained.network, batches, known, jit=jit, progress=_progress)
        if json:
            about = {"workdir": str(workdir), "step": trained.step, "dataset": trained.data.label}
            print(json_.dumps(about | findings.as_json()))
        else:
            print(f"{workdir}, checkpoint of step {trained.step}, {trained.data.label}")
            print(f"\n{findings}")
        if out:
            path = _write_page(findings, f"{workdir}, step {trained.step}", out)
            print(f"\nwritten: {path}", file=sys.stderr)
    except OSError as error:  # an exit code of 1 would say that something is wrong with the network
        where = error.filename or "a file"
        raise UserError(f"{where} cannot be read: {error.strerror or error}.") from error
    return 0 if findings.healthy else 1 if findings.found else 2


def audit_batches(split: "Examples", batch_size: int, images: int | None) -> "list[Batch]":
    """Returns four or more batches of different images in random order, at most of training's size.

    >>> import numpy as np
    >>> from bnjax.data.datasets import Split
    >>> split = Split(np.zeros((100, 2, 2, 1), np.uint8), np.arange(100, dtype=np.int32))
    >>> [len(batch["label"]) for batch in audit_batches(split, 50, None)]
    [25, 25, 25, 25]
    """
    from bnjax.data.batches import TrainRows, take

    wanted = min(images or max(LEAST_BATCHES * batch_size, LEAST_IMAGES), len(split))
    size = max(2, min(batch_size, wanted // LEAST_BATCHES))
    rows = TrainRows(len(split), min(size, len(split)), seed=0)
    return [take(split, rows(step)) for step in range(max(1, wanted // size))]


def _progress(batches: "Sequence[Batch]", title: str) -> "Iterable[Batch]":
    import tqdm

    disable = not sys.stderr.isatty()
    return tqdm.tqdm(batches, title, unit="batch", disable=disable, dynamic_ncols=True, leave=False)


def _write_page(findings: "Findings", title: str, out: Path) -> Path:
    """Writes `audit.html` into a folder; returns its path."""
    charts = [_panel(findings, quantity) for quantity in TITLES] if findings.layers else []
    (out / "audit.html").write_text(_page(findings, title, charts), encoding="utf-8")
    return out / "audit.html"


def _panel(findings: "Findings", quantity: str) -> Any:
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


def _page(findings: "Findings", title: str, panels: list[Any]) -> str:
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
