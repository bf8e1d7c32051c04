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
MISSED = {"linen": REASON}


class Chain(nn.Module):
    variance: str

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(2)(x.reshape(len(x), -1))
        for _ in range(10):
            x = BatchNorm(
                momentum=0.9, variance=self.variance, epsilon=0.0, use_scale=False, use_bias=False
            )(x, use_running_average=not train)
        return nn.Dense(kit.CLASSES)(x)


def linen(sick):
    return kit.fit(Chain("unbiased" if sick else "biased"), steps=120, size=16)
