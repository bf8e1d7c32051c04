"""A small network in linen, and its training."""

import functools
from typing import Any

import flax.linen as nn
import jax
import optax

from bnjax import clinic
from zoo import kit


class Net(nn.Module):
    """Dense layers with norms; `dropout`: before the last norm, and after it."""

    norm: Any
    dropout: tuple[float, float]
    width: int

    @nn.compact
    def __call__(self, x, train, mask=None):
        mask, before, after = None if mask is None else mask[:, None], *self.dropout
        normed = functools.partial(self.norm, use_running_average=not train)
        x = x.reshape(len(x), -1)
        x = nn.relu(normed(name="norm0")(nn.Dense(self.width, name="dense0")(x), mask=mask))
        x = nn.Dropout(before, deterministic=not train)(x)
        x = nn.relu(normed(name="norm1")(nn.Dense(16, name="dense1")(x), mask=mask))
        x = nn.Dropout(after, deterministic=not train)(x)
        return nn.Dense(kit.CLASSES, name="logits")(x)


@functools.cache  # so that what was compiled for a model serves all its equals
def net(kind=nn.BatchNorm, dropout=(0.0, 0.0), width=16, momentum=0.9, **options):
    return Net(functools.partial(kind, momentum=momentum, **options), dropout, width)


def stuck(use_running_average, **options):
    """A norm that stays in training mode."""
    return nn.BatchNorm(use_running_average=False, **options)


def loss(params, stats, batch, key, *, model, train=True, mask=None, weight=1.0):
    """Returns the loss, in which examples have a weight, and the new statistics."""
    logits, written = model.apply(
        {"params": params, "batch_stats": stats},
        batch["image"],
        train,
        **({} if mask is None else {"mask": mask}),
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return (losses * weight).mean(), written["batch_stats"]


def fit(model=None, loss=loss, *, tx=None, seen=None, start=None, watch=None):
    """Trains a linen network; returns it as a patient.

    Args:
        model: the network.
        loss: (params, stats, batch, key, model=model) -> (loss, new statistics).
        tx: the optimizer; the default one is not told, which saves the time of trying it.
        seen: the batches of the training.
        start: the patient to go on from.
        watch: called with the weights after each step.
    """
    model, seen = model or net(), kit.batches() if seen is None else seen
    told, tx = tx, tx or kit.sgd(steps=len(seen))
    if start:
        params, stats = start.network.params, start.network.batch_stats
    else:
        image = kit.examples()["image"][:2]
        params, stats = model.init(jax.random.key(0), image, False).values()

    @jax.jit
    def step(params, stats, opt_state, batch, key):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, batch, key, model=model)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    opt_state = tx.init(params)
    for i, batch in enumerate(seen):
        params, stats, opt_state = step(params, stats, opt_state, batch, jax.random.key(i))
        if watch:
            watch(params)
    network = clinic.linen(model, *jax.device_get((params, stats)))
    return kit.trained(network, seen, told, start)


@functools.cache
def healthy():
    """The network that most twins are."""
    return fit()
