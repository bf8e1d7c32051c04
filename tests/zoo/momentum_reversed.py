import functools

from zoo import kit

NAME = "momentum in another framework's sense"
CAUSE = (
    "The share that is meant to be kept is replaced: the averages are hardly more than the last"
    " batch."
)
SOURCE = "https://github.com/eriklindernoren/PyTorch-YOLOv3/issues/230"
FINDS = ("stale",)
REASON = (
    "a batch of 64 is no worse than a small batch is allowed to be, and predictions move by 4 %"
)
MISSED = {"linen": REASON, "torch": REASON}


def linen(sick):
    reversed_ = kit.Net(norm=functools.partial(kit.norm, momentum=0.1))
    return kit.fit(reversed_) if sick else kit.healthy()


def torch(sick):
    from torch.nn import BatchNorm1d

    from zoo import kit_torch

    norm = functools.partial(BatchNorm1d, momentum=0.9 if sick else 0.1)
    return kit_torch.fit(kit_torch.net(norm))
