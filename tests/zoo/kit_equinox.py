"""The network of `kit_linen` in Equinox, and its training."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bnjax import clinic
from zoo import kit


class Net(eqx.Module):
    dense0: eqx.nn.Linear
    norm0: eqx.nn.BatchNorm
    before: eqx.nn.Dropout
    dense1: eqx.nn.Linear
    norm1: eqx.nn.BatchNorm
    after: eqx.nn.Dropout
    logits: eqx.nn.Linear

    def __init__(self, norm, dropout):
        keys = jax.random.split(jax.random.key(0), 3)
        self.dense0, self.norm0 = eqx.nn.Linear(64, 16, key=keys[0]), norm(16)
        self.dense1, self.norm1 = eqx.nn.Linear(16, 16, key=keys[1]), norm(16)
        self.logits = eqx.nn.Linear(16, kit.CLASSES, key=keys[2])
        self.before, self.after = (eqx.nn.Dropout(rate) for rate in dropout)

    def __call__(self, x, state, key):
        x, state = self.norm0(self.dense0(jnp.ravel(x)), state)
        x = self.before(jax.nn.relu(x), key=key)
        x, state = self.norm1(self.dense1(x), state)
        return self.logits(self.after(jax.nn.relu(x), key=key)), state


def net(kind=eqx.nn.BatchNorm, dropout=(0.0, 0.0), momentum=0.9, mode="batch"):
    """Returns a model and its state."""
    norm = functools.partial(kind, axis_name="batch", mode=mode, momentum=momentum)
    return eqx.nn.make_with_state(Net)(norm, dropout)


def loss(model, state, batch, key):
    keys = jax.random.split(key, len(batch["label"]))
    each = jax.vmap(model, (0, None, 0), (0, None), axis_name="batch")
    logits, state = each(batch["image"], state, keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), state


def fit(model=None, *, tx=None, seen=None, start=None, watch=None):
    """Trains an Equinox model with its state; as `kit_linen.fit`."""
    seen = kit.batches() if seen is None else seen
    told, tx = tx, tx or kit.sgd(steps=len(seen))
    model, state = (start.network.model, start.network.state) if start else model or net()
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, opt_state, batch, key):
        grads, state = eqx.filter_grad(loss, has_aux=True)(model, state, batch, key)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, opt_state

    for i, batch in enumerate(seen):
        model, state, opt_state = step(model, state, opt_state, batch, jax.random.key(i))
        if watch:
            watch(clinic.equinox(model, state).params)
    return kit.trained(clinic.equinox(model, state), seen, told, start)


@functools.cache
def healthy():
    """The network that most twins are."""
    return fit()
