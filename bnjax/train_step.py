"""The steps of training, evaluation and prediction: pure functions over explicit state.

The running statistics are a value: `train_step` takes them and returns them, so nobody can forget
to update them. Nothing here compiles, replicates or logs. Bind what is static with
`functools.partial` and wrap the result in `jax.jit`, `jax.pmap`, `jax.shard_map`, `jax.vmap` or
`jax.lax.scan` as you like.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct

from bnjax.arrays import (
    Array,
    Batch,
    BatchStats,
    Images,
    Labels,
    Leaf,
    Logits,
    Losses,
    Params,
    Tree,
)
from bnjax.compat import varying
from bnjax.metrics import Metrics, from_losses

LossFn = Callable[[Logits, Labels], Losses]
AxisName = str | tuple[str, ...] | None


@struct.dataclass
class TrainState:
    """Everything that training changes except the running statistics; arrays only.

    Attributes:
        step: number of batches seen, int32 [].
        params: the weights.
        opt_state: the state of the Optax transformation.
        rng: a key that never changes; the randomness of a step is `fold_in(rng, step)`.
    """

    step: Leaf
    params: Params
    opt_state: optax.OptState
    rng: Leaf


def softmax_cross_entropy(logits: Logits, label: Labels) -> Losses:
    """Returns the softmax cross-entropy of each example, in nats and at least float32.

    Args:
        logits: float [n, classes].
        label: int [n].

    >>> import jax.numpy as jnp
    >>> print(softmax_cross_entropy(jnp.zeros((1, 2)), jnp.array([1])))
    [0.6931472]
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def init_state(
    model: nn.Module, tx: optax.GradientTransformation, rng: Array, images: Images
) -> tuple[TrainState, BatchStats]:
    """Returns the state of an untrained network and its running statistics, perhaps empty.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        tx: the optimizer.
        rng: a key of `jax.random`.
        images: [n, h, w, c], uint8 or float; only shape and dtype matter.

    Raises:
        ValueError: if the model keeps collections other than `params` and `batch_stats`.
    """
    init_rng, step_rng = jax.random.split(rng)
    params, batch_stats = init_variables(model, init_rng, images)
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), step_rng), batch_stats


def init_variables(model: nn.Module, rng: Array, images: Images) -> tuple[Params, BatchStats]:
    """Returns the parameters and the running statistics of an untrained network.

    Arguments and errors as for `init_state`.
    """
    params_rng, dropout_rng = jax.random.split(rng)
    variables = dict(
        model.init({"params": params_rng, "dropout": dropout_rng}, _to_float(images), train=False)
    )
    params, batch_stats = variables.pop("params", {}), variables.pop("batch_stats", {})
    if variables:
        raise ValueError(
            f"the model {type(model).__name__} keeps the collections {sorted(variables)}; "
            "train_step carries only 'params' and "
            "'batch_stats', so these would be lost silently. Store running values under "
            "'batch_stats', or do not create them."
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
    """Returns the state, the running statistics and the metrics after one step of gradient descent.

    The loss is the mean over the real examples of the batch; with `axis_name`, over those of all
    shards together, and the gradients are summed over that axis exactly once. The running
    statistics stay what the model made of them: per replica, unless its norm layers reduce over the
    same axis. Metrics are of the network before the update.

    Args:
        state: from `init_state` or the step before.
        batch_stats: likewise.
        batch: `image` [n, h, w, c] (uint8 is divided by 255), `label` int [n], optionally `mask`
            bool [n].
        model: any linen module with `__call__(x, train=...)`; gets `mask` if its `__call__` names
            it.
        tx: the optimizer that `init_state` was given.
        loss_fn: (logits, label) -> losses [n].
        axis_name: the mapped axis or axes under `jax.pmap`, `jax.shard_map` or `jax.vmap`; None
            under plain `jax.jit`.
        skip_nonfinite: drop the whole update where the loss, a gradient or a new statistic is not
            finite: params, opt_state and batch_stats alike stay as they were. `state.step` still
            counts the batch, and the metrics count it as skipped.
    """
    dropout = dropout_key(state)
    if axis_name is not None:  # each shard drops its own units
        dropout = jax.random.fold_in(dropout, jax.lax.axis_index(axis_name))

    def loss(params: Params) -> tuple[jax.Array, tuple[BatchStats, Metrics]]:
        logits, written = forward(
            params, batch_stats, batch, model=model, train=True, dropout=dropout
        )
        losses = loss_fn(logits, batch["label"])
        metrics = _sum_over(
            from_losses(losses, logits, batch["label"], batch.get("mask")), axis_name
        )
        real = batch.get("mask", True)
        total = jnp.where(real, losses, 0).sum() / jnp.maximum(metrics.count, 1)
        return total, (written.get("batch_stats", {}), metrics)

    grads, (new_stats, metrics) = jax.grad(loss, has_aux=True)(varying(state.params, axis_name))
    grads = _sum_over(grads, axis_name)
    updates, new_opt_state = tx.update(grads, state.opt_state, state.params)
    new_params = optax.apply_updates(state.params, updates)
    if skip_nonfinite:
        # Statistics that are not synced may be bad on one shard only; all shards have to drop the
        # step together.
        bad = (
            _sum_over((~_is_finite((grads, metrics.loss, new_stats))).astype(jnp.int32), axis_name)
            > 0
        )
        new, old = (
            (new_params, new_opt_state, new_stats),
            (state.params, state.opt_state, batch_stats),
        )
        new_params, new_opt_state, new_stats = jax.tree.map(
            lambda new, old: jnp.where(bad, old, new), new, old
        )
        metrics = metrics.replace(skipped=bad.astype(jnp.int32))
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

    What an image yields depends on no other image.

    Arguments as for `train_step`; raw, averaged, recomputed or folded weights and statistics are
    all evaluated by this.
    """
    logits, _ = forward(params, batch_stats, batch, model=model, train=False)
    metrics = from_losses(
        loss_fn(logits, batch["label"]), logits, batch["label"], batch.get("mask")
    )
    return _sum_over(metrics, axis_name)


def predict_step(
    params: Params, batch_stats: BatchStats, images: Images, *, model: nn.Module
) -> dict[str, jax.Array]:
    """Returns `class` int32 [n] and `score` float32 [n, classes] for images [n, h, w, c]."""
    logits, _ = forward(params, batch_stats, {"image": images}, model=model, train=False)
    return classes_and_scores(logits)


def classes_and_scores(logits: Logits) -> dict[str, jax.Array]:
    """Returns `class` int32 [n] and `score` float32 [n, classes], the softmax of the logits."""
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
    """Returns the logits of a batch, and the collections that the pass wrote.

    Every pass through a model in bnjax is this one.

    Args:
        params: the weights.
        batch_stats: the running statistics.
        batch: `image` [n, h, w, c] and optionally `mask` bool [n], as for `train_step`.
        model: any linen module, as for `train_step`.
        train: normalise by the batch, drop units, and write `batch_stats`.
        dropout: the key that says which units are dropped; None in evaluation.
        capture: also write `intermediates`, the outputs of modules, as `capture_intermediates` of
            `flax.linen.Module.apply`.
        mutable: the collections that may be written; None: `batch_stats` in training, and none in
            evaluation.
    """
    images, options = _model_inputs(model, batch)
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


def dropout_key(state: TrainState) -> jax.Array:
    """Returns the key of the dropped units of the step that comes next."""
    return jax.random.fold_in(state.rng, state.step)


def _to_float(images: Images) -> Images:
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def _model_inputs(model: nn.Module, batch: Batch) -> tuple[Images, dict[str, Any]]:
    """Returns the images as floats, padding blanked, and the model's further arguments."""
    images, mask = _to_float(batch["image"]), batch.get("mask")
    if mask is None:
        return images, {}
    # Whatever padding holds, NaN included, would come back through the gradient as 0 * NaN.
    images = jnp.where(mask.reshape(-1, *[1] * (images.ndim - 1)), images, 0)
    return images, {"mask": mask} if "mask" in inspect.signature(
        type(model).__call__
    ).parameters else {}


def _sum_over(tree: Any, axis_name: AxisName) -> Any:
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def _is_finite(tree: Any) -> jax.Array:
    """Returns whether every number in the tree is finite, bool []."""
    # The sum of x - x is 0 unless an x is infinite or NaN: a reduction that XLA fuses with whatever
    # else reads x.
    return jnp.isfinite(
        sum(jnp.sum(leaf - leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(tree))
    )
