from zoo import kit

NAME = "evaluation of a network that was never trained"
CAUSE = "The network was built and evaluated: its statistics are the initial ones."
SOURCE = "https://github.com/pytorch/pytorch/issues/5406"
FINDS = ("never-updated",)


def linen(sick):
    return kit.fit(seen=[]) if sick else kit.healthy()


def nnx(sick):
    from zoo import kit_nnx

    return kit_nnx.fit(seen=[] if sick else None)


def equinox(sick):
    from zoo import kit_equinox

    return kit_equinox.fit(seen=[] if sick else None)


def torch(sick):
    from zoo import kit_torch

    return kit_torch.fit(seen=[] if sick else None)
