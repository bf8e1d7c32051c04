"""The norms by name, all called as `norm(x, use_running_average=not train, mask=mask)`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from bnjax.norms.batch_norm import BatchNorm
from bnjax.norms.per_example import FilterResponseNorm, GroupNorm, Identity, InstanceNorm, LayerNorm
from bnjax.norms.per_example import RMSNorm as RMSNorm
from bnjax.norms.per_example import StandardizedConv as StandardizedConv
from bnjax.norms.per_example import ThresholdedLinear as ThresholdedLinear
from bnjax.norms.variants import BatchRenorm, GhostBatchNorm

NORMS: dict[str, type[nn.Module]] = {
    "batch": BatchNorm,
    "ghost": GhostBatchNorm,
    "renorm": BatchRenorm,
    "layer": LayerNorm,
    "group": GroupNorm,
    "instance": InstanceNorm,
    "rms": RMSNorm,
    "frn": FilterResponseNorm,
    "none": Identity,
}
# Those with running averages, which need more than one example a batch.
BATCH_NORMS = tuple(name for name, norm in NORMS.items() if issubclass(norm, BatchNorm))
# Those that need more than one position an example: images, not vectors.
POSITION_NORMS = ("instance", "frn")


def build(norm: str, /, **options: Any) -> Callable[..., nn.Module]:
    """Returns what makes a layer of this kind; called with `name`.

    Args:
        norm: one of `NORMS`.
        options: fields of these classes. Those that this norm does not have are left out, so that
            one set of options serves every norm; what is not given is as the class has it.

    Raises:
        ValueError: for a name that no norm has.
        TypeError: for an option that no norm has.

    >>> build("ghost", momentum=0.75, virtual_batch=16, groups=5)(name="norm").virtual_batch
    16
    """
    if norm not in NORMS:
        raise ValueError(f"there is no norm named {norm!r}; there are {', '.join(NORMS)}")
    known = set().union(*(_options(kind) for kind in NORMS.values()))
    if unknown := sorted(set(options) - known):
        raise TypeError(f"no norm has the options {unknown}; there are {', '.join(sorted(known))}")
    own = _options(NORMS[norm])
    return partial(NORMS[norm], **{key: value for key, value in options.items() if key in own})


def _options(norm: type[nn.Module]) -> set[str]:
    """Returns the fields of a norm's class without the two that every linen module has."""
    return {field.name for field in dataclasses.fields(norm)} - {"name", "parent"}
