"""What evaluation loses by the stored statistics: the same images under them and under their own.

A gap between training and evaluation has two causes: other images, and other statistics. Here the
images are the same, so that what remains is the statistics' doing.
"""

from collections.abc import Iterable
from typing import NamedTuple

import flax.linen as nn
import numpy as np
from flax.traverse_util import flatten_dict

from bnjax.clinic.layers import NormLayer, Seen, nothing_seen, observe
from bnjax.metrics import Metrics, from_losses
from bnjax.train_step import LossFn, eval_step, softmax_cross_entropy
from bnjax.types import Batch, BatchStats, Params


class Gap(NamedTuple):
    """One batch evaluated twice.

    Attributes:
        stored: its metrics under the running statistics.
        batch: its metrics when every norm takes the batch's statistics; no unit is dropped.
        seen: those statistics, for `bnjax.clinic.precise.put`.
    """

    stored: Metrics
    batch: Metrics
    seen: Seen


class Drift(NamedTuple):
    """How far the stored statistics of one norm are from the true ones.

    In the units of what the norm puts out, so that epsilon is added to every variance; of a dead
    channel, whose variance is 0, nothing is made that evaluation does not see. True statistics of n
    images are themselves uncertain, of a dense layer's norm by 1/sqrt(n) in `mean`.

    Attributes:
        mean: (stored mean - true mean) / true standard deviation, root mean square over channels.
        variance: log(stored variance / true variance), natural, mean over channels: above 0 the
            norm's output is too small in evaluation, below 0 too large.
    """

    mean: float
    variance: float


def gap(
    params: Params,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
) -> Gap:
    """Returns one batch evaluated under the running statistics and under its own; to be compiled.

    Arguments as for `bnjax.train_step.eval_step`.
    """
    logits, seen = observe(
        params, batch_stats, nothing_seen(batch_stats), batch, model=model, mode="batch"
    )
    losses = loss_fn(logits, batch["label"])
    return Gap(
        stored=eval_step(params, batch_stats, batch, model=model, loss_fn=loss_fn),
        batch=from_losses(losses, logits, batch["label"], batch.get("mask")),
        seen=seen,
    )


def drift(stored: BatchStats, true: BatchStats, layers: Iterable[NormLayer]) -> dict[str, Drift]:
    """Returns how far apart two sets of statistics are, for each norm by its name.

    One that stands for several, under `nn.scan` or `nn.vmap`, is there once.

    Args:
        stored: the running statistics.
        true: of the same network, from `bnjax.clinic.precise`.
        layers: from `bnjax.clinic.layers.norm_layers`; they give the order and epsilon.
    """
    its, own = (
        {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(stats).items()}
        for stats in (stored, true)
    )

    def of(layer: NormLayer) -> Drift:
        mean, variance = (*layer.path, "mean"), (*layer.path, "var")
        scale = own[variance] + layer.module.epsilon
        with np.errstate(invalid="ignore", divide="ignore"):  # a variance that is negative is NaN
            apart = np.log((its[variance] + layer.module.epsilon) / scale)
        shift = np.square(its[mean] - own[mean]) / scale
        return Drift(float(np.sqrt(shift.mean())), float(apart.mean()))

    return {layer.name: of(layer) for layer in layers}
