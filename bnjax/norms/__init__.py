"""The normalisation layers, built by name and all called as `norm(x, use_running_average=not train, mask=mask)`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from bnjax.norms.batch import BatchNorm
from bnjax.norms.frn import FilterResponseNorm, ThresholdedLinear
from bnjax.norms.ghost import GhostBatchNorm
from bnjax.norms.group import GroupNorm
from bnjax.norms.instance import InstanceNorm
from bnjax.norms.layer import LayerNorm
from bnjax.norms.none import Identity
from bnjax.norms.renorm import BatchRenorm, paper_limits
from bnjax.norms.rms import RMSNorm
from bnjax.norms.weight_standardization import StandardizedConv

__all__ = [
    "BATCH_NORMS",
    "NORMS",
    "POSITION_NORMS",
    "BatchNorm",
    "BatchRenorm",
    "FilterResponseNorm",
    "GhostBatchNorm",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "StandardizedConv",
    "ThresholdedLinear",
    "build",
]

NORMS = ("batch", "ghost", "renorm", "layer", "group", "instance", "rms", "frn", "none")
# Those with running averages, which need more than one example a batch.
BATCH_NORMS = ("batch", "ghost", "renorm")
# Those that need more than one position an example: images, not vectors.
POSITION_NORMS = ("instance", "frn")


def build(
    name: str,
    *,
    momentum: float = 0.75,
    epsilon: float = 1e-3,
    scale: bool = True,
    shift: bool = True,
    variance: str = "biased",
    debias: bool = False,
    virtual_batch: int = 32,
    renorm_steps: int = 40_000,
    groups: int = 10,
    axis_name: str | None = None,
) -> Callable[..., nn.Module]:
    """Returns what makes a layer of this kind; called with `name`.

    Args:
        name: one of `NORMS`.
        momentum: the fraction of the old running average that is kept, as in Flax, TensorFlow and Keras.
        epsilon: added to the variance.
        scale: whether the layer learns a scale for each channel.
        shift: likewise, a shift.
        variance: what the running average stores, "biased" or "unbiased".
        debias: whether the running averages leave out their initial values.
        virtual_batch: the examples of a virtual batch ("ghost").
        renorm_steps: when the limits are fully open ("renorm").
        groups: of the channels ("group").
        axis_name: the mapped axis over which the statistics of a batch are taken.

    Raises:
        ValueError: for an unknown name.
    """
    affine: dict[str, Any] = {"epsilon": epsilon, "use_scale": scale, "use_bias": shift}
    batch: dict[str, Any] = {
        **affine,
        "momentum": momentum,
        "variance": variance,
        "debias": debias,
        "axis_name": axis_name,
    }
    r_max, d_max = paper_limits(renorm_steps)
    makers: dict[str, Callable[..., nn.Module]] = {
        "batch": partial(BatchNorm, **batch),
        "ghost": partial(GhostBatchNorm, virtual_batch=virtual_batch, **batch),
        "renorm": partial(BatchRenorm, r_max=r_max, d_max=d_max, **batch),
        "layer": partial(LayerNorm, **affine),
        "group": partial(GroupNorm, groups=groups, **affine),
        "instance": partial(InstanceNorm, **affine),
        "rms": partial(RMSNorm, **affine),
        "frn": partial(FilterResponseNorm, **affine),
        "none": Identity,
    }
    if name not in makers:
        raise ValueError(f"there is no norm named {name!r}; there are {', '.join(makers)}")
    return makers[name]
