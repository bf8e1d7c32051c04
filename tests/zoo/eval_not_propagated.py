import functools

import flax.linen as nn

from zoo import kit

NAME = "a norm that evaluation mode does not reach"
CAUSE = "One norm stays in training mode whatever the network is set to."
SOURCE = "https://github.com/pytorch/pytorch/issues/20875"
FINDS = ("batch-dependent",)


def stuck(use_running_average, **options):
    return nn.BatchNorm(use_running_average=False, momentum=0.9, **options)


def linen(sick):
    return kit.fit(kit.Net(norm=stuck)) if sick else kit.healthy()


def nnx(sick):
    from flax import nnx as flax_nnx

    from zoo import kit_nnx

    class Stuck(flax_nnx.BatchNorm):
        def __call__(self, x):
            return super().__call__(x, use_running_average=False)

    return (
        kit_nnx.fit(kit_nnx.Net(functools.partial(Stuck, momentum=0.9)))
        if sick
        else kit_nnx.healthy()
    )


def torch(sick):
    from torch.nn import BatchNorm1d

    from zoo import kit_torch

    class Stuck(BatchNorm1d):
        def train(self, mode=True):
            return super().train(True)

    patient = kit_torch.fit(kit_torch.net(Stuck if sick else BatchNorm1d))
    return patient.knowing(predict=kit_torch.predicting(patient.network))
