from zoo import kit

NAME = "dropout before a norm"
CAUSE = "Dropout raises the variance of a later norm's input in training only."
SOURCE = "https://arxiv.org/abs/1801.05134"
FINDS = ("variance-shift",)


def linen(sick):
    return kit.fit(kit.Net(dropout=(0.5, 0.0) if sick else (0.0, 0.5)))


def nnx(sick):
    from zoo import kit_nnx

    return kit_nnx.fit(kit_nnx.Net(dropout=(0.5, 0.0) if sick else (0.0, 0.5)))


def equinox(sick):
    from equinox.nn import make_with_state

    from zoo import kit_equinox

    rates = (0.5, 0.0) if sick else (0.0, 0.5)
    return kit_equinox.fit(make_with_state(kit_equinox.Net)(dropout=rates))


def torch(sick):
    from zoo import kit_torch

    return kit_torch.fit(kit_torch.net(dropout=(0.5, 0.0) if sick else (0.0, 0.5)))
