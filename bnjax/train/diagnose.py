"""Where a step that is not finite went bad first."""

import functools
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnjax.arrays import Batch, BatchStats, Logits, Params
from bnjax.train_step import LossFn, TrainState, dropout_key, forward, softmax_cross_entropy


def first_nonfinite(
    state: TrainState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
) -> str | None:
    """Returns what in a training step is not finite first, in the order of the computation, in words; None if all is finite.

    Looks at the images, the parameters, the statistics, the output of each layer, the new statistics, the losses and the gradients.
    The forward pass is not compiled, so that the layers are met in the order in which they run.

    Args:
        state: as it was before the step, `step` included, since dropout depends on it.
        batch_stats: likewise.
        batch: the batch of the step.
        model: as for `train_step`.
        loss_fn: as for `train_step`.
    """
    bind = functools.partial(forward, model=model, train=True, dropout=dropout_key(state))
    logits, written = bind(state.params, batch_stats, batch, capture=True)

    def losses_of(logits: Logits) -> jax.Array:
        return jnp.where(batch.get("mask", True), loss_fn(logits, batch["label"]), 0)

    def loss(params: Params) -> jax.Array:
        return losses_of(bind(params, batch_stats, batch)[0]).sum()

    images = batch["image"] if "mask" not in batch else batch["image"][np.asarray(batch["mask"])]
    stages = [
        ("the image values", images),
        ("the parameter", state.params),
        ("the running statistic", batch_stats),
        ("the output of layer", written["intermediates"]),
        ("the new statistic", written.get("batch_stats", {})),
        ("the losses", losses_of(logits)),
    ]
    for words, tree in stages:
        for name in _bad_leaves(tree):
            return f"{words} {name}".strip()
    for name in _bad_leaves(jax.jit(jax.grad(loss))(state.params)):
        return f"the gradient of {name}"
    return None


def _bad_leaves(tree: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the paths of the leaves that are not finite, in the order in which they were put into the tree."""
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from _bad_leaves(branch, (*path, key))
    elif not all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(tree)):
        yield ".".join(path).removesuffix("__call__").rstrip(".")
