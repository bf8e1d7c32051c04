"""`bnjax audit`: finds faults in the running statistics of a trained network."""

import functools
import html
import json as json_
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from bnjax.commands import Checkpoint, DataDir, Json, Workdir
from bnjax.errors import UserError

if TYPE_CHECKING:
    from bnjax.data.batches import Examples
    from bnjax.types import Batch

LEAST_BATCHES = 4  # the least number of batches to compare
LEAST_IMAGES = 2048
PAGE = """<!doctype html>
<html lang="en" style="color-scheme: light dark">
<head><meta charset="utf-8"><title>{title}</title></head>
<body style="font: 16px/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 76rem">
<h1>{title}</h1>
{table}</body></html>
"""


def run(
    workdir: Workdir,
    checkpoint: Checkpoint = "last",
    data_dir: DataDir = None,
    images: Annotated[
        int | None,
        arg(
            metavar="N",
            help="the number of training images; default: 2,048 or four batches, whichever is more",
        ),
    ] = None,
    json: Json = False,
    out: Annotated[
        Path | None, arg(metavar="DIR", help="also write audit.html into this folder")
    ] = None,
) -> int:
    """Find faults in the running statistics of a trained network, with causes and fixes.

    The exit status is 0 without findings, 1 with findings, and 2 if there was nothing to audit.
    """
    if images is not None and images < 8:
        raise UserError(f"--images {images} is too few: give 8 or above.")
    import jax

    from bnjax.clinic import Run, audit
    from bnjax.models.layers import with_views
    from bnjax.text import counted, progress
    from bnjax.train.cpu import compiler_options, prepare
    from bnjax.train.optimizers import optimizer
    from bnjax.train.trained import Trained
    from bnjax.train_step import forward

    prepare()
    try:
        if out:
            out.mkdir(parents=True, exist_ok=True)
        trained = Trained(workdir, checkpoint)
        batch_size = trained.config.train.batch_size
        batches = audit_batches(trained.dataset(data_dir).train, batch_size, images)
        options = compiler_options()
        # The audit runs the network at most six times on each batch, plus three times.
        bar = progress((), "audit", "batch", 6 * len(batches) + 3)
        jit = counted(functools.partial(jax.jit, compiler_options=options), bar)
        evaluation = trained.config.eval
        model = with_views(trained.model, evaluation.views, evaluation.views_share)
        evaluate = jit(functools.partial(forward, model=model, train=False))
        known = Run(
            steps=trained.step or None,  # at step 0 the averages come from another framework
            batch_size=batch_size,
            weights=trained.weights,
            tx=optimizer(trained.config, max(trained.step, 1)),
            predict=lambda images: evaluate(trained.params, trained.batch_stats, {"image": images})[
                0
            ],
        )
        with bar:
            findings = audit(trained.network, batches, known, jit=jit)
        title = f"{workdir}, checkpoint of step {trained.step}, {trained.data.label}"
        if json:
            about = {"workdir": str(workdir), "step": trained.step, "dataset": trained.data.label}
            print(json_.dumps(about | findings.to_dict()))
        else:
            print(f"{title}\n\n{findings}")
            if any("clinic.precise" in one.illness.cure for one in findings.found):
                out_dir = f"{workdir}-precise"
                print(f"\nrecompute with: bnjax precise --workdir {workdir} --out {out_dir}")
        if out:
            page = PAGE.format(title=html.escape(title), table=findings._repr_html_())
            (out / "audit.html").write_text(page, encoding="utf-8")
            print(f"\nwritten: {out / 'audit.html'}", file=sys.stderr)
    except OSError as error:  # raised as UserError, because exit status 1 means findings
        where = error.filename or "a file"
        raise UserError(f"{where} cannot be read: {error.strerror or error}.") from error
    return 0 if findings.healthy else 1 if findings.found else 2


def audit_batches(split: "Examples", batch_size: int, images: int | None) -> "list[Batch]":
    """Returns at least four batches of distinct random images; none exceeds a training batch.

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
