import copy
import dataclasses

import jax
import numpy as np

from bnjax import clinic
from zoo import kit

NAME = "federated average with the statistics of one client"
CAUSE = "Only parameters are averaged on the server; the statistics are those of the first client."
SOURCE = "https://github.com/TsingZ0/PFLlib/issues/260"
FINDS = ("stale",)


def linen(sick):
    start, of = kit.healthy(), kit.examples()
    clients = []
    for mine in (of["label"] < 2, of["label"] >= 2):
        seen = kit.batches(20, of={name: leaf[mine] for name, leaf in of.items()})
        clients.append(kit.fit(start=start, seen=seen).network)
    params = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *(one.params for one in clients))
    patient = start.but(params=params, batch_stats=clients[0].batch_stats)
    return patient if sick else patient.recomputed()


def equinox(sick):
    from zoo import kit_equinox

    start, of = kit_equinox.healthy(), kit.examples()
    clients = []
    for mine in (of["label"] < 2, of["label"] >= 2):
        seen = kit.batches(20, of={name: leaf[mine] for name, leaf in of.items()})
        clients.append(kit_equinox.fit(start=start, seen=seen).network)
    average = kit_equinox.averaged([client.model for client in clients])
    patient = dataclasses.replace(start, network=clinic.equinox(average, clients[0].state))
    return patient if sick else patient.recomputed()


def torch(sick):
    from torch.optim.swa_utils import AveragedModel, update_bn

    from zoo import kit_torch

    start, of = kit_torch.healthy(), kit.examples()
    clients = []
    for mine in (of["label"] < 2, of["label"] >= 2):
        seen = kit.batches(20, of={name: leaf[mine] for name, leaf in of.items()})
        clients.append(kit_torch.fit(copy.deepcopy(start.network), seen=seen).network)
    average = AveragedModel(clients[0])
    for client in clients:
        average.update_parameters(client)
    if not sick:
        update_bn(map(kit_torch.images, start.batches), average)
    return dataclasses.replace(start, network=average.module.eval())
