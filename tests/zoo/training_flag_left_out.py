import functools

from zoo import kit

NAME = "training flag left out of a custom loop"
CAUSE = "The loop calls the network without training=True, so nothing updates the statistics."
SOURCE = "https://github.com/keras-team/keras/issues/20378"
FINDS = ("never-updated",)


def linen(sick):
    return kit.fit(loss=functools.partial(kit.loss, train=not sick))


def torch(sick):
    from zoo import kit_torch

    return kit_torch.fit(step=functools.partial(kit_torch.step, train=not sick))
