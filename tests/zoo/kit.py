"""What the cases share: a small network in each library, its training, and batches."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from patients import shared_jit

from bnjax import clinic
from bnjax.clinic import Run

STEPS, SIZE, CLASSES = 60, 64, 4
norm = functools.partial(nn.BatchNorm, momentum=0.9)


@dataclasses.dataclass(frozen=True, eq=False)
class Patient:
    """What an audit takes.

    In torch, `network` is a module, `before` the one before a fine-tuning, and `like` the linen
    network to port them into, if not `Net`.
    """

    network: Any
    batches: Sequence[Any]
    run: Run
    like: Any = None
    before: Any = None

    def but(self, **changes: Any) -> "Patient":
        return dataclasses.replace(self, network=dataclasses.replace(self.network, **changes))

    def knowing(self, **changes: Any) -> "Patient":
        return dataclasses.replace(self, run=dataclasses.replace(self.run, **changes))

    def recomputed(self) -> "Patient":
        return dataclasses.replace(self, network=clinic.precise(self.network, self.batches))


@functools.cache
def ids(patient):
    """Returns the findings of bnjax's audit."""
    if hasattr(patient.network, "state_dict"):
        from zoo import kit_torch

        patient = kit_torch.ported(patient)
    return clinic.audit(patient.network, patient.batches, patient.run, jit=shared_jit).ids


class Net(nn.Module):
    """Dense layers with norms; `dropout`: before the last norm, and after it."""

    norm: Any = norm
    dropout: tuple[float, float] = (0.0, 0.0)
    width: int = 16

    @nn.compact
    def __call__(self, x, train, mask=None):
        mask, before, after = None if mask is None else mask[:, None], *self.dropout
        normed = functools.partial(self.norm, use_running_average=not train)
        x = x.reshape(len(x), -1)
        x = nn.relu(normed(name="norm0")(nn.Dense(self.width, name="dense0")(x), mask=mask))
        x = nn.Dropout(before, deterministic=not train)(x)
        x = nn.relu(normed(name="norm1")(nn.Dense(16, name="dense1")(x), mask=mask))
        return nn.Dense(CLASSES, name="logits")(nn.Dropout(after, deterministic=not train)(x))


NET = Net()


@functools.cache
def examples(n=512, seed=0):
    """Noise with a bright row, float32 in 0 to 1; which row is the label."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n).astype(np.int32)
    image = rng.uniform(0, 0.5, (n, 8, 8, 1)).astype(np.float32)
    image[np.arange(n), label * 2] += 0.12
    return {"image": image, "label": label}


def batches(count, size=SIZE, seed=1, of=None):
    """Batches in random order, epoch after epoch."""
    of, rng = of or examples(), np.random.default_rng(seed)
    n = len(of["label"])
    order = np.concatenate([rng.permutation(n) for _ in range(-(-count * size // n))])
    rows = order[: count * size].reshape(count, size)
    return [{name: leaf[one] for name, leaf in of.items()} for one in rows]


def audited(size=SIZE, **options):
    """Other batches of the same examples."""
    return batches(max(6, 96 // size), size, seed=7, **options)


def loss(params, stats, batch, key, *, model, train=True):
    """Returns the loss and the new statistics."""
    logits, written = model.apply(
        {"params": params, "batch_stats": stats},
        batch["image"],
        train,
        mutable=["batch_stats"],
        rngs={"dropout": key},
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), written["batch_stats"]


def sgd(rate=0.05, steps=STEPS):
    return optax.sgd(optax.cosine_decay_schedule(rate, steps), momentum=0.9)


def fit(
    model=NET, loss=loss, *, tx=None, seen=None, start=None, steps=STEPS, size=SIZE, watch=None
):
    """Trains a linen network; returns it as a patient, with the facts that a user knows.

    Args:
        model: the network.
        loss: (params, stats, batch, key, model=model) -> (loss, new statistics).
        tx: the optimizer; the default one is not told, which saves the time of trying it.
        seen: the batches of the training.
        start: the patient to go on from.
        steps, size: of the training, without `seen`.
        watch: called with the weights after each step.
    """
    seen = batches(steps, size) if seen is None else seen
    told, tx = tx, tx or sgd(steps=max(1, len(seen)))
    if start is None:
        params, stats = model.init(jax.random.key(0), examples()["image"][:2], False).values()
        start = Patient(clinic.linen(model, params, stats), (), Run(0))
    params, stats = start.network.params, start.network.batch_stats
    opt_state = tx.init(params)
    step = _step(functools.partial(loss, model=model), tx)
    for i, batch in enumerate(seen):
        params, stats, opt_state = step(params, stats, opt_state, batch, jax.random.key(i))
        if watch:
            watch(params)
    network = clinic.linen(model, *jax.device_get((params, stats)))
    return Patient(network, audited(size), Run(start.run.steps + len(seen), size, tx=told))


def _step(loss, tx):
    @jax.jit
    def step(params, stats, opt_state, batch, key):
        grads, stats = jax.grad(loss, has_aux=True)(params, stats, batch, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    return step


@functools.cache
def healthy():
    """The network that most twins are."""
    return fit()
