"""A whole split through `eval_step` or `predict_step`, every image counted once."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from bnjax.arrays import Batch, BatchStats, Params
from bnjax.data.batches import eval_batches
from bnjax.metrics import Metrics


def evaluate(
    eval_step: Callable[[Params, BatchStats, Batch], Metrics],
    params: Params,
    batch_stats: BatchStats,
    batches: Iterable[Batch],
) -> Metrics:
    """Returns the metrics over all batches; `eval_step` has its statics bound and is compiled.

    Raises:
        ValueError: if there is no batch.
    """
    metrics = [eval_step(params, batch_stats, batch) for batch in batches]
    if not metrics:
        raise ValueError("there is nothing to evaluate: no batch was given")
    return functools.reduce(Metrics.merge, jax.device_get(metrics))


def predict(
    predict_step: Callable[[Params, BatchStats, Any], dict[str, jax.Array]],
    params: Params,
    batch_stats: BatchStats,
    image: np.ndarray,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Returns `class` int32 [n] and `score` float32 [n, classes] for images [n, h, w, c], in their order."""
    label = np.zeros(len(image), np.int32)
    outputs = [
        predict_step(params, batch_stats, batch["image"])
        for batch in eval_batches(image, label, batch_size)
    ]
    return {
        name: np.concatenate([np.asarray(output[name]) for output in outputs])[: len(image)]
        for name in ("class", "score")
    }
