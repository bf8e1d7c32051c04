"""Networks adapted to images that have shifted since training; no label is needed.

Both functions return weights and running statistics of the same shapes: what evaluates, saves and
folds the network that was trained does so with the adapted one.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from bnjax.clinic.freeze import affine_mask, freeze
from bnjax.clinic.layers import nothing_seen, observe
from bnjax.clinic.precise import By, precise
from bnjax.types import Batch, BatchStats, Leaf, Logits, Losses, Params


def adapt_statistics(
    model: nn.Module,
    params: Params,
    batch_stats: BatchStats,
    batches: Iterable[Batch],
    *,
    keep: float = 0.0,
    by: By = "batch",
    jit: Callable[..., Any] = jax.jit,
) -> tuple[Params, BatchStats]:
    """Returns the same weights, and running statistics that fit the new images.

    Every mean and variance becomes keep * old + (1 - keep) * new, where the new ones are precise
    (Schneider et al., 2020, section 3). The paper gives the old ones the weight of N examples
    beside n new ones: `keep` is N / (N + n) then. A few new images say too little by themselves,
    which is what N is for; where the shift is large, the old ones are in the way all the same.

    Args:
        model: any linen module whose norms are Flax's or bnjax's BatchNorm.
        params: its weights.
        batch_stats: its running statistics, of the training images.
        batches: of the new images: `image` [n, h, w, c] and optionally `mask` bool [n]; any
            iterable, but one that can be gone through several times for "population".
        keep: from 0, precise statistics of the new images, to 1, the old ones.
        by: what normalises the layers before the one whose statistics are taken, as for `precise`;
            the paper, which mixes as it predicts, has "population".
        jit: compiles a function.

    Raises:
        ValueError: as `precise` does.
    """
    return params, precise(model, params, batches, batch_stats, by=by, keep=keep, jit=jit)


def tent(
    model: nn.Module,
    params: Params,
    batch_stats: BatchStats,
    batches: Iterable[Batch],
    *,
    tx: optax.GradientTransformation,
    epochs: int = 1,
    patterns: Sequence[str] = ("*",),
    jit: Callable[..., Any] = jax.jit,
) -> tuple[Params, BatchStats]:
    """Returns weights whose scales and biases make the network surer of the new images.

    One step of `tent_step` for each batch, in order, `epochs` times (TENT: Wang et al., 2021,
    section 3). Then the precise statistics of the new images under the adapted weights, so that
    what an image yields does not depend on its batch: the paper evaluates by the batch instead.

    Args:
        model: any linen module whose norms are Flax's or bnjax's BatchNorm.
        params: its weights.
        batch_stats: its running statistics.
        batches: of the new images, as for `precise`, in an iterable that can be gone through
            several times. Each gives one step: 128 images or more.
        tx: the optimizer of scale and bias; the paper has `optax.adam(1e-3)` for CIFAR-10. It sees
            no other parameter.
        epochs: how often the images are gone through.
        patterns: the norms whose scale and bias are adapted, as for `affine_mask`.
        jit: compiles a function.

    Raises:
        ValueError: if there is no batch, no norm that matches, or `batches` cannot be gone through
            again.
    """
    if iter(batches) is batches:
        raise ValueError(
            "the batches are gone through several times, and these can be gone through only once. "
            "Give a list of them."
        )
    tx = affine_only(tx, params, batch_stats, *patterns)
    step = jit(functools.partial(tent_step, model=model, tx=tx))
    adapted, opt_state = params, tx.init(params)
    for _ in range(epochs):
        for batch in batches:
            adapted, opt_state, _, _ = step(adapted, opt_state, batch_stats, batch)
    return adapted, precise(model, adapted, batches, batch_stats, jit=jit)


def tent_step(
    params: Params,
    opt_state: optax.OptState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
) -> tuple[Params, optax.OptState, Logits, Leaf]:
    """Returns weights and optimizer after one step, and the logits and mean entropy before it.

    Every norm normalises by the batch, no unit is dropped, and the gradient of the mean entropy of
    the real examples' predictions goes through the batch's statistics. For a stream: the logits
    are predictions of images as they come.

    Args:
        params: the weights.
        opt_state: of `tx`, which is initialised with the weights.
        batch_stats: the running statistics; only their shapes matter.
        batch: `image` [n, h, w, c] and optionally `mask` bool [n].
        model: any linen module whose norms are Flax's or bnjax's BatchNorm.
        tx: from `affine_only`.
    """

    def loss(params: Params) -> tuple[jax.Array, Logits]:
        seen = nothing_seen(batch_stats)
        logits, _ = observe(params, batch_stats, seen, batch, model=model, mode="batch")
        real = jnp.asarray(batch.get("mask", jnp.ones(len(logits), bool)))
        # Padding first: what its logits are, is nobody's business, and 0 * NaN is NaN.
        entropies = entropy(jnp.where(real[:, None], logits, 0))
        return jnp.sum(entropies, where=real) / jnp.maximum(real.sum(), 1), logits

    (mean, logits), grads = jax.value_and_grad(loss, has_aux=True)(params)
    # The updates of all other weights are 0 whatever their gradients, which are not computed then.
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, logits, mean


def affine_only(
    tx: optax.GradientTransformation, params: Params, batch_stats: BatchStats, *patterns: str
) -> optax.GradientTransformation:
    """Returns an optimizer of the norms' scales and biases, that leaves all else alone.

    Arguments and errors as for `bnjax.clinic.freeze.affine_mask`.
    """
    affine = affine_mask(params, batch_stats, *patterns)
    return freeze(tx, jax.tree.map(lambda adapted: not adapted, affine))


def entropy(logits: Logits) -> Losses:
    """Returns the entropy of the predictions, in nats and at least float32.

    H = - sum over the classes of p log p, where p is the softmax of the logits.

    >>> [round(float(nats), 3) for nats in entropy(jnp.array([[0.0, 0.0], [3.0, 0.0]]))]
    [0.693, 0.191]
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
