import dataclasses
import functools

import jax
import optax

from zoo import kit

NAME = "moving average of the weights without the statistics"
CAUSE = "The trainable variables are averaged; the statistics are those of the raw weights."
SOURCE = "https://github.com/huggingface/pytorch-image-models/issues/102"
FINDS = ("stale",)


def linen(sick):
    weights = []
    patient = kit.fit(tx=optax.sgd(0.5), watch=weights.append)
    average = functools.reduce(
        lambda old, new: jax.tree.map(lambda one, other: 0.98 * one + 0.02 * other, old, new),
        weights,
    )
    patient = patient.but(params=jax.device_get(average))
    return patient if sick else patient.recomputed()


def torch(sick):
    from torch.optim import SGD
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

    from zoo import kit_torch

    model = kit_torch.net()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    patient = kit_torch.fit(
        model,
        optimizer=lambda model: SGD(model.parameters(), 0.5),
        watch=average.update_parameters,
    )
    average.module.load_state_dict(dict(model.named_buffers()), strict=False)
    if not sick:
        update_bn(map(kit_torch.images, patient.batches), average)
    return dataclasses.replace(patient, network=average.module.eval())
