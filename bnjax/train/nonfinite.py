"""Handles steps with a non-finite loss, gradient or statistic.

`train_step` drops the update of such a step. The program counts consecutive non-finite steps, and
the run stops with an explanation if there are more than the config allows.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnjax.errors import NonFiniteError
from bnjax.train_step import LossFn, TrainState, dropout_key, forward, softmax_cross_entropy
from bnjax.types import Batch, BatchStats, Logits, Losses, Params, named_leaves


def too_many(bad_steps: Any, most_skipped: int) -> Any:
    """Returns whether training stops after this number of consecutive bad steps."""
    return bad_steps > most_skipped


def until_stopped(losses: Losses, bad_steps: Any, most_skipped: int) -> Losses:
    """Returns the losses, or NaN after too many consecutive bad steps.

    With a NaN loss, later steps change nothing. The host detects bad steps only after it has
    dispatched more steps, and it needs the state before the first bad step.
    """
    return jnp.where(too_many(bad_steps, most_skipped), jnp.nan, losses)


def explained(step: int, bad_steps: int, saved: int | None, where: str | None) -> NonFiniteError:
    """Returns the error that ends a run after a bad step.

    Args:
        step: the number of the bad step.
        bad_steps: the number of consecutive bad steps, including this one.
        saved: the step of the newest checkpoint, or None.
        where: the result of `first_nonfinite`.
    """
    found = "When recomputed layer by layer, all values are finite."
    if where:
        found = f"The first non-finite value is in {where}."
    kept = (
        "Nothing has been saved yet" if saved is None else f"The checkpoint of step {saved} is kept"
    )
    rows = f" and {bad_steps - 1} before it" if bad_steps > 1 else ""
    return NonFiniteError(
        f"step {step}{rows} gave a loss, a gradient or a statistic that is not finite. {found} "
        f"{kept}. Check the images, and try a lower learning rate "
        "(--config.optimizer.learning_rate=…), a larger config.model.epsilon, or float32 instead "
        "of bfloat16; --config.train.on_nonfinite=skip drops such steps and continues. A changed "
        "config needs a different --workdir."
    )


def first_nonfinite(
    state: TrainState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
) -> str | None:
    """Describes the first non-finite value in a training step; None if all values are finite.

    Checks the images, the parameters, the statistics, the output of each layer, the new statistics,
    the losses and the gradients. The forward pass is not compiled, so that the layers are checked
    in the order of computation.

    Args:
        state: the state before the step; its `step` must be correct, because dropout depends on the
            step.
        batch_stats: the statistics before the step.
        batch: the batch of the step.
        model, loss_fn: as for `train_step`.
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


def _bad_leaves(tree: Any) -> list[str]:
    """Returns the names of the non-finite leaves, in the order of the tree."""
    leaves = named_leaves(tree).items()
    bad = [name for name, leaf in leaves if not np.isfinite(np.asarray(leaf, np.float32)).all()]
    # The name of a layer's output has the form "conv0.__call__.0".
    return [name.partition("__call__")[0].rstrip(".") for name in bad]
