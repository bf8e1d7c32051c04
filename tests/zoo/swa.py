import copy
import dataclasses

import jax
import numpy as np
import optax

from bnjax import clinic
from zoo import kit

NAME = "stochastic weight averaging without bn_update"
CAUSE = "Averaged weights were never run, so the stored statistics are those of other weights."
SOURCE = "https://github.com/timgaripov/swa/issues/7"
FINDS = ("stale",)
MISSED = {"torch": "the loss is a third higher, but predictions move by 2 % only"}


def linen(sick):
    start, weights = kit.healthy(), []
    kit.fit(start=start, tx=optax.sgd(1.0), watch=weights.append)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *weights[9::10])
    patient = start.but(params=mean)
    return patient if sick else patient.recomputed()


def nnx(sick):
    from flax import nnx as flax_nnx

    from zoo import kit_nnx

    start, weights = kit_nnx.healthy(), []
    kit_nnx.fit(
        kit_nnx.of(start),
        tx=optax.sgd(1.0),
        watch=lambda model: weights.append(jax.device_get(flax_nnx.state(model, flax_nnx.Param))),
    )
    average = kit_nnx.of(start)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *weights[9::10])
    flax_nnx.update(average, mean)
    patient = dataclasses.replace(start, network=clinic.nnx(average))
    return patient if sick else patient.recomputed()


def equinox(sick):
    from zoo import kit_equinox

    start, models = kit_equinox.healthy(), []
    kit_equinox.fit(start=start, tx=optax.sgd(1.0), watch=models.append)
    network = clinic.equinox(kit_equinox.averaged(models[9::10]), start.network.state)
    patient = dataclasses.replace(start, network=network)
    return patient if sick else patient.recomputed()


def torch(sick):
    from torch.optim import SGD
    from torch.optim.swa_utils import AveragedModel, update_bn

    from zoo import kit_torch

    start, models = kit_torch.healthy(), []
    average = AveragedModel(start.network)
    kit_torch.fit(
        start.network,
        optimizer=lambda model: SGD(model.parameters(), 1.0),
        watch=lambda model: models.append(copy.deepcopy(model)),
    )
    for model in models[9::10]:
        average.update_parameters(model)
    if not sick:
        update_bn(map(kit_torch.images, start.batches), average)
    return dataclasses.replace(start, network=average.module.eval())
