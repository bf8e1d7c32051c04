"""The network of `kit_linen` in NNX, and its training."""

import copy
import functools

import optax
from flax import nnx

from bnjax import clinic
from zoo import kit


class Net(nnx.Module):
    def __init__(self, norm, dropout):
        rngs = nnx.Rngs(0)
        self.dense0, self.norm0 = nnx.Linear(64, 16, rngs=rngs), norm(16, rngs=rngs)
        self.dense1, self.norm1 = nnx.Linear(16, 16, rngs=rngs), norm(16, rngs=rngs)
        self.logits = nnx.Linear(16, kit.CLASSES, rngs=rngs)
        self.before, self.after = (nnx.Dropout(rate, rngs=rngs) for rate in dropout)

    def __call__(self, x):
        x = nnx.relu(self.norm0(self.dense0(x.reshape(len(x), -1))))
        x = nnx.relu(self.norm1(self.dense1(self.before(x))))
        return self.logits(self.after(x))


def net(kind=nnx.BatchNorm, dropout=(0.0, 0.0), momentum=0.9, **options):
    return Net(functools.partial(kind, momentum=momentum, **options), dropout)


class stuck(nnx.BatchNorm):
    """A norm that stays in training mode."""

    def __call__(self, x):
        return super().__call__(x, use_running_average=False)


def loss(model, batch):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["image"]), batch["label"])
    return losses.mean()


def fit(model=None, loss=loss, *, tx=None, wrt=nnx.Param, seen=None, start=None, watch=None, **run):
    """Trains an NNX model, and changes it; as `kit_linen.fit`.

    The loss is a function of (model, batch), in the mode that the model has; `tx` trains the
    variables `wrt`; `run` has facts about the training.
    """
    model, seen = model or net(), kit.batches() if seen is None else seen
    model = model_of(start) if start else model
    optimizer = nnx.Optimizer(model, tx or kit.sgd(steps=len(seen)), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, grads)

    for batch in seen:
        step(model, optimizer, batch)
        if watch:
            watch(clinic.nnx(model).params)
    return kit.trained(clinic.nnx(model), seen, tx, start, **run)


@functools.cache
def healthy():
    """The network that most twins are."""
    return fit()


def model_of(patient):
    """Returns a copy of the model of a patient."""
    return copy.deepcopy(patient.network.model)
