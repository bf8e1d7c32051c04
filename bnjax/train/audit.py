"""The audit of a run: everything that its folder knows goes into it."""

import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import tqdm

from bnjax.clinic.audit import Findings, Run, audit
from bnjax.data.batches import take, train_rows
from bnjax.data.records import Examples
from bnjax.train.cpu import compiler_options
from bnjax.train.optimizer import optimizer
from bnjax.train.trained import Trained
from bnjax.train_step import forward
from bnjax.types import Batch

LEAST_BATCHES = 4  # to see how much batches differ
USUAL_IMAGES = 2048  # at least, where there are so many


def of_run(
    workdir: Path, checkpoint: str, data_dir: str | None, images: int | None
) -> tuple[dict[str, Any], Findings]:
    """Returns which network it is, and what is wrong with its running statistics.

    Args:
        workdir: the run's folder.
        checkpoint: "best", "last" or a step.
        data_dir: where the data lie, if not where they lay in training.
        images: how many training images are looked at, drawn at random; None for four batches of
            training, and 2,048 at least.

    Raises:
        UserError: if the folder has no run or no such checkpoint, or the data are not found.
    """
    trained = Trained(workdir, checkpoint)
    split, batch_size = trained.dataset(data_dir).train, trained.config.train.batch_size
    batches = audit_batches(split, batch_size, images)
    size = len(batches[0]["image"])
    jit = functools.partial(jax.jit, compiler_options=compiler_options(size))
    evaluate = jit(functools.partial(forward, model=trained.model, train=False))

    def predict(images: Any) -> Any:
        return evaluate(trained.params, trained.batch_stats, {"image": images})[0]

    run = Run(
        steps=trained.step,
        batch_size=batch_size,
        weights=trained.weights,
        tx=optimizer(trained.config, max(trained.step, 1)),
        predict=predict,
    )
    about = {"workdir": str(workdir), "step": trained.step, "dataset": trained.data.label}
    variables = (trained.model, trained.params, trained.batch_stats)
    return about, audit(*variables, batches, run, jit=jit, watch=_watch)


def audit_batches(split: Examples, batch_size: int, images: int | None) -> list[Batch]:
    """Returns four batches or more of different images in random order, of training's size at most.

    >>> import numpy as np
    >>> from bnjax.data.datasets import Split
    >>> split = Split(np.zeros((100, 2, 2, 1), np.uint8), np.arange(100, dtype=np.int32))
    >>> [len(batch["label"]) for batch in audit_batches(split, 50, None)]
    [25, 25, 25, 25]
    """
    wanted = images or max(LEAST_BATCHES * batch_size, USUAL_IMAGES)
    wanted = min(wanted, len(split))
    size = max(2, min(batch_size, wanted // LEAST_BATCHES))
    rows = train_rows(len(split), min(size, len(split)), seed=0)
    return [take(split, next(rows)) for _ in range(max(1, wanted // size))]


def _watch(batches: Sequence[Batch], name: str) -> Iterable[Batch]:
    disable = not sys.stderr.isatty()
    return tqdm.tqdm(batches, name, unit="batch", disable=disable, dynamic_ncols=True, leave=False)
