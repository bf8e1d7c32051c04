"""Builds the optimizer of a config: Adam, SGD or Muon, with schedules and weight averaging."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

from bnjax.clinic.averaging import weight_average
from bnjax.types import Leaf, Params

# Three Newton-Schulz steps with these coefficients bring singular values near 1 (K. Jordan, 2024).
NEWTON_SCHULZ = {"ns_coeffs": (3.4576, -4.7391, 2.0843), "ns_steps": 3}


def optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer that a config describes, for gradients of the mean loss.

    Args:
        config: the whole config.
        steps: the number of steps in the run, after which the schedule ends.
    """
    options = config.optimizer
    rate = schedule(options, options.learning_rate, steps)
    decayed = None if options.weight_decay_mask == "all" else kernels
    if options.name == "muon":
        tx = _muon(config, rate, steps)
    elif options.name == "sgd":
        tx = _sgd(rate, options.momentum, options.nesterov, options.weight_decay, decayed)
    else:
        betas = {"b1": options.b1, "b2": options.b2, "eps": options.eps}
        tx = optax.adam(rate, **betas)
        if options.weight_decay:
            tx = optax.adamw(rate, **betas, weight_decay=options.weight_decay, mask=decayed)
    if options.reduction == "sum":
        tx = optax.chain(optax.scale(config.train.batch_size), tx)
    if options.average == "none":
        return tx
    return weight_average(
        tx,
        kind=options.average,
        decay=options.average_decay,
        start=options.average_start,
        every=options.average_every,
    )


def schedule(options: ConfigDict, peak: float, steps: int) -> Any:
    """Returns the learning rate: a number, or a function of the step.

    Args:
        options: the section `optimizer`.
        peak: the highest learning rate.
        steps: the number of steps after which a falling rate has reached 0.

    >>> from bnjax.train.config import default_config
    >>> options = default_config().optimizer
    >>> options.schedule, options.warmup = "linear", 0.5
    >>> [round(float(schedule(options, 8.0, 8)(step)), 3) for step in (0, 2, 4, 6, 8)]
    [0.0, 4.0, 8.0, 4.0, 0.0]
    """
    rising = round(options.warmup * steps)
    falling = max(steps - rising, 1)
    if options.schedule == "one_cycle":  # the divisors are those of torch and Smith & Topin, 2018
        return optax.cosine_onecycle_schedule(steps, peak, options.warmup or 0.3, 25.0, 1e4)
    if options.schedule == "linear":
        rate: Any = optax.linear_schedule(peak, 0.0, falling)
    elif options.schedule == "cosine":
        rate = optax.cosine_decay_schedule(peak, falling)
    elif options.schedule == "steps":
        drops = {round(drop * steps) - rising: 0.1 for drop in options.drops}
        rate = optax.piecewise_constant_schedule(peak, drops)
    else:
        rate = peak
    if not rising:
        return rate
    up = optax.linear_schedule(0.0, peak, rising)
    down = rate if callable(rate) else optax.constant_schedule(rate)
    return optax.join_schedules([up, down], [rising])


def kernels(params: Params) -> Any:
    """Returns a mask for Optax that is True for trained kernels."""
    return jax.tree.map(lambda kind: kind in ("convolution", "dense"), kinds(params))


def kinds(params: Params) -> Any:
    """Returns the kind of each leaf, which determines how Muon trains the leaf.

    "convolution" and "dense" mark kernels; "fixed" and "whitening" mark the kernel and the bias of
    a `bnjax.models.speednet.Whitening`; "other" marks all other leaves.
    """

    def kind(path: Any, leaf: Any) -> str:
        *_, parent, name = ["", *(str(getattr(key, "key", key)) for key in path)]
        if parent == "whiten":
            return "fixed" if name == "kernel" else "whitening"
        if name != "kernel":
            return "other"
        return "convolution" if jnp.ndim(leaf) > 2 else "dense"

    return jax.tree_util.tree_map_with_path(kind, params)


def _sgd(
    rate: Any, momentum: float, nesterov: bool, decay: float, decayed: Any
) -> optax.GradientTransformation:
    tx = optax.sgd(rate, momentum=momentum or None, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(decay, decayed), tx) if decay else tx


def _muon(config: ConfigDict, rate: Any, steps: int) -> optax.GradientTransformation:
    """Returns Muon for the kernels of convolutions, and SGD with separate rates for the rest.

    Optax orthogonalises the update. Unlike `optax.contrib.muon`, this optimizer rescales kernels to
    a fixed norm, and trains the rest with SGD instead of AdamW.
    """
    options, muon = config.optimizer, config.muon
    every, more = muon.rescale_every
    all_decay = options.weight_decay_mask == "all"

    def sgd(peak: float, steps: int, *, decays: bool) -> optax.GradientTransformation:
        # At the peak rate, a step decays weights by the fraction weight_decay.
        decay = options.weight_decay / peak if decays else 0.0
        return _sgd(schedule(options, peak, steps), options.momentum, True, decay, None)

    def as_matrix(params: Params) -> Any:
        return jax.tree.map(
            lambda leaf: contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1),
            params,
        )

    return optax.partition(
        {
            "convolution": optax.chain(
                contrib.scale_by_muon(
                    beta=muon.beta,
                    nesterov=True,
                    weight_dimension_numbers=as_matrix,
                    **NEWTON_SCHULZ,
                ),
                optax.scale_by_learning_rate(rate),
                rescale(every, more, steps),
            ),
            "dense": sgd(muon.head_rate, steps, decays=True),
            "whitening": sgd(muon.bias_rate, muon.whiten_steps or steps, decays=all_decay),
            "fixed": optax.set_to_zero(),
            "other": sgd(muon.bias_rate, steps, decays=all_decay),
        },
        kinds,
    )


class RescaleState(NamedTuple):
    """The state of `rescale`: the number of updates so far, int32 []."""

    updates: Leaf


def rescale(every: int, more: int, steps: int) -> optax.GradientTransformation:
    """Rescales kernels to the norm sqrt(output channels) before an update is added.

    The scale of a kernel in front of a batch norm has no effect on the output, and the effective
    learning rate is the size of the step relative to the norm of the kernel. With a fixed norm, the
    schedule alone sets that rate. This must be the last transformation in a chain.

    Args:
        every, more: kernels are rescaled every `every + int(more * progress)` updates.
        steps: the total number of updates.
    """

    def init(params: Params) -> RescaleState:
        del params
        return RescaleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: RescaleState, params: Any = None) -> tuple[Any, RescaleState]:
        interval = every + (more * state.updates / steps).astype(jnp.int32)
        is_due = state.updates % interval == 0

        def moved(update: jax.Array, kernel: jax.Array) -> jax.Array:
            norm = jnp.maximum(jnp.linalg.norm(kernel), jnp.finfo(kernel.dtype).tiny)
            onto = kernel * (jnp.sqrt(kernel.shape[-1]) / norm) - kernel
            return update + jnp.where(is_due, onto, 0)

        return jax.tree.map(moved, updates, params), RescaleState(state.updates + 1)

    return optax.GradientTransformation(init, update)
