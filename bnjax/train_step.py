"""Steps for training, evaluation and prediction, as pure functions of explicit state.

`train_step` takes the running statistics as an argument and returns new ones. Nothing here
compiles, replicates or logs. Bind the static arguments with `functools.partial` and wrap the result
in `jax.jit`, `jax.pmap`, `jax.shard_map`, `jax.vmap` or `jax.lax.scan`.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from bnjax.compat import varying
from bnjax.loss import LossFn, softmax_cross_entropy
from bnjax.metrics import Metrics, from_losses
from bnjax.nonfinite import is_finite, unless
from bnjax.types import (
    Array,
    Batch,
    BatchStats,
    Images,
    Leaf,
    Logits,
    Params,
    Tree,
)

AxisName = str | tuple[str, ...] | None
# The new statistics and the metrics of a step, computed from the examples on one shard.
Written = tuple[BatchStats, Metrics]


@struct.dataclass
class TrainState:
    """The training state without the running statistics; contains only arrays.

    Attributes:
        step: the number of batches processed so far, int32 [].
        params: the weights.
        opt_state: the state of the Optax optimizer.
        rng: a constant random key; each step uses `fold_in(rng, step)`.
    """

    step: Leaf
    params: Params
    opt_state: optax.OptState
    rng: Leaf


def init_state(
    model: nn.Module, tx: optax.GradientTransformation, rng: Array, images: Images
) -> tuple[TrainState, BatchStats]:
    """Returns the initial training state and running statistics; the latter may be empty.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        tx: the optimizer.
        rng: a JAX random key.
        images: [n, h, w, c], uint8 or float; for most models only the shape and dtype matter.

    Raises:
        ValueError: if the model has collections other than `params` and `batch_stats`.
    """
    init_rng, step_rng = jax.random.split(rng)
    params, batch_stats = init_variables(model, init_rng, images)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), step_rng), batch_stats


def init_variables(model: nn.Module, rng: Array, images: Images) -> tuple[Params, BatchStats]:
    """Returns the initial parameters and running statistics of a network.

    Arguments and errors are as for `init_state`.
    """
    params_rng, dropout_rng = jax.random.split(rng)
    variables = dict(
        model.init({"params": params_rng, "dropout": dropout_rng}, to_float(images), train=False)
    )
    params, batch_stats = variables.pop("params", {}), variables.pop("batch_stats", {})
    if variables:
        raise ValueError(
            f"the model {type(model).__name__} creates the collections {sorted(variables)}, but "
            "train_step supports only 'params' and 'batch_stats'. Store running values in "
            "'batch_stats'."
        )
    return params, batch_stats


def train_step(
    state: TrainState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    loss_fn: LossFn = softmax_cross_entropy,
    axis_name: AxisName = None,
    skip_nonfinite: bool = False,
) -> tuple[TrainState, BatchStats, Metrics]:
    """Takes one step of gradient descent; returns the new state, statistics and metrics.

    The loss is the mean over the unmasked examples of the batch. With `axis_name` it is the mean
    over all shards, and gradients are summed over this axis exactly once. The running statistics
    are updated separately on each shard, unless the norms of the model reduce over the same axis.
    The metrics are computed with the weights before the update.

    Args:
        state: the training state, from `init_state` or the previous step.
        batch_stats: the running statistics, returned by the same call as `state`.
        batch: `image` [n, h, w, c] (uint8 is divided by 255), `label` int [n] (or, for mixed
            images, class probabilities [n, classes]), and optionally `mask` bool [n].
        model: any linen module with `__call__(x, train=...)`; if its `__call__` also accepts
            `mask`, the mask is passed to it.
        tx: the optimizer that was passed to `init_state`.
        loss_fn: a function (logits, label) -> losses [n].
        axis_name: the mapped axis or axes of `jax.pmap`, `jax.shard_map` or `jax.vmap`; None for
            plain `jax.jit`.
        skip_nonfinite: whether to leave params, opt_state and batch_stats unchanged if the loss, a
            gradient or a new statistic is not finite. `state.step` still counts the batch, and the
            metrics count it as skipped.
    """
    dropout, count = dropout_key(state, axis_name), count_of(batch, axis_name)
    loss = loss_of(batch_stats, batch, model, loss_fn, dropout, count)
    found = jax.grad(loss, has_aux=True)(varying(state.params, axis_name))
    return descend(state, batch_stats, found, tx, axis_name, skip_nonfinite)


def loss_of(
    batch_stats: BatchStats,
    batch: Batch,
    model: nn.Module,
    loss_fn: LossFn,
    dropout: jax.Array,
    count: Any,
) -> Callable[[Params], tuple[jax.Array, Written]]:
    """Returns a function that maps weights to the training loss, new statistics and metrics.

    Args:
        batch_stats, batch, model, loss_fn: as for `train_step`.
        dropout: the key for dropout.
        count: the number by which the summed losses are divided, int [].
    """

    def loss(params: Params) -> tuple[jax.Array, Written]:
        logits, written = forward(
            params, batch_stats, batch, model=model, train=True, dropout=dropout
        )
        losses = loss_fn(logits, batch["label"])
        metrics = from_losses(losses, logits, batch["label"], batch.get("mask"))
        total = jnp.where(batch.get("mask", True), losses, 0).sum() / jnp.maximum(count, 1)
        return total, (written.get("batch_stats", {}), metrics)

    return loss


def descend(
    state: TrainState,
    batch_stats: BatchStats,
    found: tuple[Params, Written],
    tx: optax.GradientTransformation,
    axis_name: AxisName,
    skip_nonfinite: bool,
) -> tuple[TrainState, BatchStats, Metrics]:
    """Applies gradients summed over all shards; arguments and results are as for `train_step`.

    `found` contains the gradient, the new statistics and the metrics of one shard.
    """
    grads, (new_stats, metrics) = found
    grads, metrics = _sum_over((grads, metrics), axis_name)
    updates, new_opt_state = tx.update(grads, state.opt_state, state.params)
    new_params = optax.apply_updates(state.params, updates)
    if skip_nonfinite:
        # If statistics are not synchronised, they may be non-finite on a single shard. All shards
        # must then drop the step.
        finite = is_finite((grads, metrics.loss, new_stats))
        bad = _sum_over((~finite).astype(jnp.int32), axis_name) > 0
        old = (state.params, state.opt_state, batch_stats)
        new_params, new_opt_state, new_stats = unless(
            bad, (new_params, new_opt_state, new_stats), old
        )
        metrics = dataclasses.replace(metrics, skipped=bad.astype(jnp.int32))
    return TrainState(state.step + 1, new_params, new_opt_state, state.rng), new_stats, metrics


def eval_step(
    params: Params,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
    axis_name: AxisName = None,
) -> Metrics:
    """Returns the metrics of one batch under the running statistics.

    With norms in evaluation mode, the result for an image does not depend on the other images in
    the batch. Arguments are as for `train_step`; the weights and statistics may be averaged,
    recomputed or folded.
    """
    logits, _ = forward(params, batch_stats, batch, model=model, train=False)
    metrics = from_losses(
        loss_fn(logits, batch["label"]), logits, batch["label"], batch.get("mask")
    )
    return _sum_over(metrics, axis_name)


def predict_step(
    params: Params, batch_stats: BatchStats, images: Images, *, model: nn.Module
) -> dict[str, jax.Array]:
    """Returns `class`, int32 [n], and `score`, float32 [n, classes], for images [n, h, w, c]."""
    logits, _ = forward(params, batch_stats, {"image": images}, model=model, train=False)
    return classes_and_scores(logits)


def classes_and_scores(logits: Logits) -> dict[str, jax.Array]:
    """Returns `class`, int32 [n], and `score`, float32 [n, classes], the softmax of the logits."""
    scores = jax.nn.softmax(logits.astype(jnp.float32))
    return {"class": logits.argmax(-1).astype(jnp.int32), "score": scores}


def forward(
    params: Params,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    train: bool,
    dropout: jax.Array | None = None,
    capture: bool | Callable[[nn.Module, str], bool] = False,
    mutable: Sequence[str] | None = None,
) -> tuple[Logits, dict[str, Tree]]:
    """Runs the model on a batch; returns the logits and the updated collections.

    Every forward pass in bnjax calls this function.

    Args:
        params, batch_stats, batch, model: as for `train_step`; the batch needs no `label`.
        train: whether to normalise by batch statistics, apply dropout and update `batch_stats`.
        dropout: the key for dropout; None in evaluation.
        capture: the argument `capture_intermediates` of `flax.linen.Module.apply`; it adds the
            outputs of modules to the result, as `intermediates`.
        mutable: the mutable collections. None means `batch_stats` in training and no collection in
            evaluation.
    """
    images, options = model_inputs(model, batch)
    variables = {"params": params, "batch_stats": batch_stats}
    if mutable is None:
        mutable = ["batch_stats"] if train else []
    if capture:
        options["capture_intermediates"] = capture
        mutable = [*mutable, "intermediates"]
    rngs = {} if dropout is None else {"dropout": dropout}
    logits, written = model.apply(
        variables, images, train=train, mutable=[*mutable], rngs=rngs, **options
    )
    return logits, dict(written)


def dropout_key(state: TrainState, axis_name: AxisName = None) -> jax.Array:
    """Returns the dropout key for the next step, which differs between shards."""
    key = jax.random.fold_in(state.rng, state.step)
    return key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))


def count_of(batch: Batch, axis_name: AxisName = None) -> Any:
    """Returns the number of unmasked examples in a batch, summed over all shards, int []."""
    mask = batch.get("mask")
    count = batch["label"].shape[0] if mask is None else mask.sum(dtype=jnp.int32)
    return _sum_over(count, axis_name)


def to_float(images: Images) -> Images:
    """Returns uint8 images divided by 255, and float images unchanged."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def model_inputs(model: Any, batch: Batch) -> tuple[Images, dict[str, Any]]:
    """Returns float images with padding set to zero, and `mask` if the model accepts it."""
    images, mask = to_float(batch["image"]), batch.get("mask")
    if mask is None:
        return images, {}
    # NaN in padding would enter the gradient as 0 * NaN.
    images = jnp.where(mask.reshape(-1, *[1] * (images.ndim - 1)), images, 0)
    return images, {"mask": mask} if takes_mask(type(model)) else {}


def takes_mask(model: type) -> bool:
    """Returns whether the `__call__` of a class of models accepts `mask`."""
    return "mask" in inspect.signature(model.__call__).parameters


def _sum_over(tree: Any, axis_name: AxisName) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
