import functools

import jax

from bnjax import clinic
from zoo import kit

NAME = "two forward passes in a step"
CAUSE = "A second pass in training mode, of noisy images, updates the statistics once more."
SOURCE = "https://github.com/m2lines/Samudra/issues/572"
FINDS = ("updated-twice",)


def noisy(batch):
    return batch | {"image": batch["image"] + 0.2}


def linen(sick):
    def loss(params, stats, batch, key, model):
        value, new = kit.loss(params, stats, batch, key, model=model)
        other, again = kit.loss(params, new, noisy(batch), key, model=model)
        return value + other, again if sick else new

    @jax.jit
    def step(network, batch):
        key = jax.random.key(0)
        _, stats = loss(network.params, network.batch_stats, batch, key, network.model)
        return network.replace(batch_stats=stats)

    return kit.fit(loss=loss).knowing(step=step)


def nnx(sick):
    from flax import nnx as flax_nnx

    from zoo import kit_nnx

    def loss(model, batch):
        value = kit_nnx.loss(model, batch)
        again = model if sick else flax_nnx.clone(model)
        return value + kit_nnx.loss(again, noisy(batch))

    def step(network, batch):
        model = network.model
        loss(model, batch)
        return clinic.nnx(model)

    return kit_nnx.fit(loss=loss, step=step)


def torch(sick):
    from zoo import kit_torch

    def loss(model, batch):
        value = kit_torch.loss(model, batch)
        model.norm0.momentum = model.norm1.momentum = 0.1 if sick else 0.0
        value = value + kit_torch.loss(model, noisy(batch))
        model.norm0.momentum = model.norm1.momentum = 0.1
        return value

    return kit_torch.fit(step=functools.partial(kit_torch.step, loss=loss))
