"""The network of `kit` in NNX, and its training."""

import copy
import functools

import optax
from flax import nnx

from bnjax import clinic
from bnjax.clinic import Run
from zoo import kit

norm = functools.partial(nnx.BatchNorm, momentum=0.9)


class Net(nnx.Module):
    def __init__(self, norm=norm, dropout=(0.0, 0.0)):
        rngs = nnx.Rngs(0)
        self.dense0, self.norm0 = nnx.Linear(64, 16, rngs=rngs), norm(16, rngs=rngs)
        self.dense1, self.norm1 = nnx.Linear(16, 16, rngs=rngs), norm(16, rngs=rngs)
        self.logits = nnx.Linear(16, kit.CLASSES, rngs=rngs)
        self.before, self.after = (nnx.Dropout(rate, rngs=rngs) for rate in dropout)

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.dense0(x.reshape(len(x), -1))))
        x = nnx.relu(self.norm1(self.dense1(self.before(x))))
        return self.logits(self.after(x))


def loss(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
    return losses.mean()


def fit(model=None, loss=loss, *, tx=None, wrt=nnx.Param, seen=None, watch=None, **run):
    """Trains an NNX model; returns it as a patient, with the facts that a user knows.

    Args:
        model: the model; it is changed.
        loss: (model, batch) -> loss; the mode of the model is the loop's business.
        tx: the optimizer, of the variables `wrt`.
        seen: the batches of the training.
        watch: called with the model after each step.
        run: facts about the training.
    """
    model = Net() if model is None else model
    seen = kit.batches(kit.STEPS) if seen is None else seen
    told, tx = tx, tx or kit.sgd(steps=max(1, len(seen)))
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, grads)

    for batch in seen:
        step(model, optimizer, batch)
        if watch:
            watch(model)
    facts = {"steps": len(seen), "batch_size": kit.SIZE, "tx": told} | run
    return kit.Patient(clinic.nnx(model), kit.audited(facts["batch_size"]), Run(**facts))


@functools.cache
def healthy():
    """The network that most twins are."""
    return fit()


def of(patient):
    """Returns the model of a patient, a copy."""
    return copy.deepcopy(patient.network.model)
