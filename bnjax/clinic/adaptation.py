"""Adapts batch norms to images from a different distribution."""

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
    """Adapts the scales and biases of norms to minimise the entropy of the predictions.

    Takes one `tent_step` for each batch in each epoch (TENT: Wang et al., 2021, section 3). Then
    computes the precise statistics of the new images with the adapted weights, so that the
    prediction for an image does not depend on its batch. (The paper uses batch statistics.)

    Args:
        network: a network whose norms are its library's own BatchNorm or bnjax's.
        batches: a repeatable iterable of batches of the new images, as for `precise`;
            preferably with 128 or more images per batch.
        tx: the optimizer for the scales and biases; the paper uses `optax.adam(1e-3)` for CIFAR-10.
        epochs: the number of passes over the images.
        patterns: the norms to adapt, as for `affine_mask`.
        jit: the function used for compilation.

    Raises:
        ValueError: if there are no batches, no norm matches, or `batches` is an iterator.
    """
    if iter(batches) is batches:
        raise ValueError("`batches` is iterated several times: give a list, not an iterator")
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
    Every norm normalises by batch statistics, and dropout is off. The loss is the mean entropy over
    unmasked examples; its gradient includes the gradient through the batch statistics. When images
    arrive as a stream, use the returned logits as predictions.

    Args:
        network: the network; the values of its running statistics have no effect.
        opt_state: the state of `tx`.
        batch: `image` [n, h, w, c] and optionally `mask` bool [n].
        tx: the optimizer, from `affine_only`.
    """

    def loss(params: Params) -> tuple[jax.Array, Logits]:
        seen = nothing_seen(network.batch_stats)
        logits, _ = dataclasses.replace(network, params=params).observe(seen, batch, mode="batch")
        real = jnp.asarray(batch.get("mask", jnp.ones(len(logits), bool)))
        # The logits of padding may be NaN, and 0 * NaN is NaN.
        entropies = entropy(jnp.where(real[:, None], logits, 0))
        return jnp.sum(entropies, where=real) / jnp.maximum(real.sum(), 1), logits

    (mean, logits), grads = jax.value_and_grad(loss, has_aux=True)(network.params)
    # XLA does not compute gradients for other weights, because their updates are 0.
    updates, opt_state = tx.update(grads, opt_state, network.params)
    params = optax.apply_updates(network.params, updates)
    return dataclasses.replace(network, params=params), opt_state, logits, mean


def affine_only(
    tx: optax.GradientTransformation, params: Params, batch_stats: BatchStats, *patterns: str
) -> optax.GradientTransformation:
    """Returns an optimizer that updates only the scales and biases of matching norms.

    Arguments and errors are as for `bnjax.clinic.freezing.affine_mask`.
    """
    affine = affine_mask(params, batch_stats, *patterns)
    return without_frozen(tx, jax.tree.map(lambda adapted: not adapted, affine))


def entropy(logits: Logits) -> Losses:
    """Returns the entropy of each prediction in nats, as float32 or wider.

    H = -sum(p log p) over the classes, where p is the softmax of the logits.

    >>> [round(float(nats), 3) for nats in entropy(jnp.array([[0.0, 0.0], [3.0, 0.0]]))]
    [0.693, 0.191]
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
