import collections
import dataclasses

import flax.linen as nn

from bnjax.norms import BatchNorm
from zoo import kit

NAME = "unbiased variances, layer after layer"
CAUSE = (
    "Training divides by the biased variance and stores the unbiased one: outputs shrink with "
    "depth."
)
SOURCE = "https://github.com/pytorch/pytorch/issues/100048"
FINDS = ("stale",)
REASON = (
    "each layer stores what its norm promises; the audit does not add up the factors of n / (n - 1)"
)
SLOW = True
MISSED = {"linen": REASON, "torch": REASON}


class Chain(nn.Module):
    variance: str = "unbiased"

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(2)(x.reshape(len(x), -1))
        for _ in range(20):
            x = BatchNorm(
                momentum=0.9, variance=self.variance, epsilon=0.0, use_scale=False, use_bias=False
            )(x, use_running_average=not train)
        return nn.Dense(kit.CLASSES)(x)


def linen(sick):
    return kit.fit(Chain("unbiased" if sick else "biased"), steps=120, size=32)


def torch(sick):
    """The twin stores biased variances, as other libraries do."""
    from torch import nn as torch_nn

    from zoo import kit_torch

    class Biased(torch_nn.BatchNorm1d):
        def forward(self, x):
            y = super().forward(x)
            if self.training:
                self.running_var.data -= self.momentum * x.var(0).detach() / len(x)
            return y

    kind = torch_nn.BatchNorm1d if sick else Biased
    layers = {"flat": torch_nn.Flatten(), "Dense_0": torch_nn.Linear(64, 2)}
    layers |= {f"BatchNorm_{i}": kind(2, eps=1e-12, affine=False) for i in range(20)}
    layers |= {"Dense_1": torch_nn.Linear(2, kit.CLASSES)}
    model = torch_nn.Sequential(collections.OrderedDict(layers))
    patient = kit_torch.fit(model, seen=kit.batches(120, 32), batch_size=32)
    return dataclasses.replace(patient, like=Chain("unbiased" if sick else "biased"))
