import functools

import jax

from zoo import kit

NAME = "recalibration that keeps the reset statistics"
CAUSE = (
    "Statistics are reset for averaged weights, then updated with a momentum that keeps all of "
    "the old value."
)
SOURCE = "https://github.com/Lightning-AI/pytorch-lightning/issues/14866"
FINDS = ("never-updated",)


def linen(sick):
    patient = kit.healthy()
    if not sick:
        return patient.recomputed()
    network = patient.network
    stats = network.model.init(jax.random.key(0), patient.batches[0]["image"], False)["batch_stats"]
    keeping = network.model.clone(norm=functools.partial(kit.norm, momentum=1.0))
    for batch in patient.batches:
        _, stats = kit.loss(network.params, stats, batch, jax.random.key(0), model=keeping)
    return patient.but(batch_stats=jax.device_get(stats))


def torch(sick):
    from zoo import kit_torch

    patient = kit_torch.healthy()
    norms = patient.network.norm0, patient.network.norm1
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 0.0 if sick else None
    patient.network.train()
    for batch in patient.batches:
        patient.network(kit_torch.images(batch))
    for norm in norms:
        norm.momentum = 0.1
    patient.network.eval()
    return patient
