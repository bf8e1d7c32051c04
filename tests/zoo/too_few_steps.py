import functools

from zoo import kit

NAME = "too few steps for the momentum"
CAUSE = "Momentum 0.99 keeps half of the initial statistics over 60 steps."
SOURCE = "https://github.com/tensorflow/tensorflow/issues/1122"
FINDS = ("not-converged",)


def linen(sick):
    slow = kit.Net(norm=functools.partial(kit.norm, momentum=0.99))
    return kit.fit(slow) if sick else kit.healthy()


def nnx(sick):
    from zoo import kit_nnx

    return kit_nnx.fit(kit_nnx.Net(functools.partial(kit_nnx.norm, momentum=0.99 if sick else 0.9)))


def torch(sick):
    from torch.nn import BatchNorm1d

    from zoo import kit_torch

    norm = functools.partial(BatchNorm1d, momentum=0.01 if sick else 0.1)
    return kit_torch.fit(kit_torch.net(norm))
