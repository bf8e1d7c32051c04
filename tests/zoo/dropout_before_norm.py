from zoo import kit

NAME = "dropout before a norm"
CAUSE = "Dropout raises the variance of a later norm's input in training only."
SOURCE = "https://arxiv.org/abs/1801.05134"
FINDS = ("variance-shift",)


def linen(sick):
    return kit.fit(kit.Net(dropout=(0.5, 0.0) if sick else (0.0, 0.5)))


def torch(sick):
    from zoo import kit_torch

    return kit_torch.fit(kit_torch.net(dropout=(0.5, 0.0) if sick else (0.0, 0.5)))
