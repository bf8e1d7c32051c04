"""The precise statistics of a run's network, and what they are worth."""

import functools
import sys
from typing import Any

import jax
import tqdm

from bnjax.clinic.layers import nothing_seen
from bnjax.clinic.precise import By, precise
from bnjax.data.batches import eval_batches, spread
from bnjax.data.datasets import Dataset
from bnjax.data.feed import every_batch
from bnjax.errors import UserError
from bnjax.metrics import Metrics
from bnjax.train.cpu import compiler_options
from bnjax.train.trained import Trained
from bnjax.train_step import eval_step
from bnjax.types import BatchStats


def of_run(
    trained: Trained, data_dir: str | None, images: int, by: By
) -> tuple[dict[str, Any], BatchStats]:
    """Returns test results under stored and under precise statistics, and the latter.

    Args:
        trained: the network.
        data_dir: where the data lie, if not where they lay in training.
        images: of how many training images, at equal distances in the order of the data.
        by: as for `bnjax.clinic.precise.precise`.

    Raises:
        UserError: if the network has no running statistics, or the data are not found.
    """
    if not nothing_seen(trained.batch_stats):
        raise UserError(f"the network in {trained.workdir} has no running statistics.")
    dataset = trained.dataset(data_dir)
    images = min(images, len(dataset.train))
    chosen, batch_size = spread(dataset.train, images), trained.config.train.batch_size
    size = -(-images // -(-images // batch_size))
    batches = [*eval_batches(chosen.image, chosen.label, size)]
    jit = functools.partial(jax.jit, compiler_options=compiler_options(size))
    shown = tqdm.tqdm(batches, "statistics", unit="batch", disable=not sys.stderr.isatty())
    own = shown if by == "batch" else batches
    found = precise(trained.model, trained.params, own, trained.batch_stats, by=by, jit=jit)
    result = {
        "workdir": str(trained.workdir),
        "step": trained.step,
        "dataset": dataset.label,
        "images": images,
        "by": by,
        "test_images": len(dataset.test),
        "stored": _test(trained, trained.batch_stats, dataset),
        "precise": _test(trained, found, dataset),
    }
    return result, found


def table(result: dict[str, Any]) -> str:
    """Returns the results as lines of text."""
    lines = [
        f"{result['workdir']}, checkpoint of step {result['step']}: {result['test_images']:,} test "
        f"images of {result['dataset']}",
        f"{'statistics':12}{'loss':>8}{'accuracy':>10}",
    ]
    lines += [
        f"{name:12}{result[name]['loss']:8.4f}{result[name]['accuracy']:10.4f}"
        for name in ("stored", "precise")
    ]
    how = "its batch" if result["by"] == "batch" else "the precise statistics"
    lines.append(
        f"precise: of {result['images']:,} training images, the layers before normalised by {how}"
    )
    return "\n".join(lines)


def _test(trained: Trained, batch_stats: BatchStats, dataset: Dataset) -> dict[str, float]:
    size = min(trained.config.eval.batch_size, len(dataset.test))
    step = jax.jit(
        functools.partial(eval_step, model=trained.model), compiler_options=compiler_options(size)
    )
    batches = every_batch(dataset.test, size)
    found = [step(trained.params, batch_stats, batch) for batch in batches]
    return functools.reduce(Metrics.merge, jax.device_get(found)).means()
