"""Adaptation of batch norms to images from a different distribution."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bnjax.clinic.freezing import affine_mask, without_frozen
from bnjax.clinic.network import SameNetwork, nothing_seen
from bnjax.clinic.statistics import precise
from bnjax.types import Batch, BatchStats, Leaf, Logits, Losses, Params


def tent(
    network: SameNetwork,
    batches: Iterable[Batch],
    *,
    tx: optax.GradientTransformation,
    epochs: int = 1,
    patterns: Sequence[str] = ("*",),
    jit: Callable[..., Any] = jax.jit,
) -> SameNetwork:
    """Adapts scales and biases of norms to lower the entropy of the predictions.

    Takes one `tent_step` for each batch, in order, `epochs` times (TENT: Wang et al., 2021, section
    3), then computes the precise statistics of the new images with the adapted weights, so that
    predictions do not depend on the batch. (The paper evaluates with batch statistics.)

    Args:
        network: a network whose norms are Flax's or bnjax's BatchNorm.
        batches: a repeatable iterable of batches of the new images, as for `precise`; each with 128
            images or more.
        tx: the optimizer of scale and bias; the paper uses `optax.adam(1e-3)` for CIFAR-10.
        epochs: the number of passes over the images.
        patterns: the norms to adapt, as for `affine_mask`.
        jit: compiles a function.

    Raises:
        ValueError: if there is no batch, no norm matches, or `batches` is an iterator.
    """
    if iter(batches) is batches:
        raise ValueError("the batches are iterated several times: give a list, not an iterator")
    tx = affine_only(tx, network.params, network.batch_stats, *patterns)
    step = jit(functools.partial(tent_step, tx=tx))
    opt_state = tx.init(network.params)
    for _ in range(epochs):
        for batch in batches:
            network, opt_state, _, _ = step(network, opt_state, batch)
    return precise(network, batches, jit=jit)


def tent_step(
    network: SameNetwork,
    opt_state: optax.OptState,
    batch: Batch,
    *,
    tx: optax.GradientTransformation,
) -> tuple[SameNetwork, optax.OptState, Logits, Leaf]:
    """Updates the weights once to lower the entropy of the predictions for a batch.

    Returns the new network and optimizer state, and the logits and mean entropy before the update.
    Every norm normalises by the batch, without dropout. The gradient of the mean entropy of the
    real examples includes the gradient through the batch statistics. The logits are the predictions
    for a stream of images.

    Args:
        network: the network; of its running statistics only the shapes matter.
        opt_state: the state of `tx`.
        batch: `image` [n, h, w, c] and optionally `mask` bool [n].
        tx: from `affine_only`.
    """

    def loss(params: Params) -> tuple[jax.Array, Logits]:
        seen = nothing_seen(network.batch_stats)
        logits, _ = dataclasses.replace(network, params=params).observe(seen, batch, mode="batch")
        real = jnp.asarray(batch.get("mask", jnp.ones(len(logits), bool)))
        # The logits of padding may be NaN, and 0 * NaN is NaN.
        entropies = entropy(jnp.where(real[:, None], logits, 0))
        return jnp.sum(entropies, where=real) / jnp.maximum(real.sum(), 1), logits

    (mean, logits), grads = jax.value_and_grad(loss, has_aux=True)(network.params)
    # The updates of other weights are 0, so XLA does not compute their gradients.
    updates, opt_state = tx.update(grads, opt_state, network.params)
    params = optax.apply_updates(network.params, updates)
    return dataclasses.replace(network, params=params), opt_state, logits, mean


def affine_only(
    tx: optax.GradientTransformation, params: Params, batch_stats: BatchStats, *patterns: str
) -> optax.GradientTransformation:
    """Returns an optimizer that updates only scales and biases of norms.

    Arguments and errors as for `bnjax.clinic.freezing.affine_mask`.
    """
    affine = affine_mask(params, batch_stats, *patterns)
    return without_frozen(tx, jax.tree.map(lambda adapted: not adapted, affine))


def entropy(logits: Logits) -> Losses:
    """Returns the entropy of the predictions, in nats and at least float32.

    H = -sum(p log p) over the classes, where p is the softmax of the logits.

    >>> [round(float(nats), 3) for nats in entropy(jnp.array([[0.0, 0.0], [3.0, 0.0]]))]
    [0.693, 0.191]
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
