"""Norm layers, keyed by name. Call one as `norm(x, use_running_average=not train, mask=mask)`."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from bnjax.norms.batch_norm import BatchNorm
from bnjax.norms.per_example import FilterResponseNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
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
}
# The norms with running averages, which need more than one example per batch.
BATCH_NORMS = tuple(name for name, norm in NORMS.items() if issubclass(norm, BatchNorm))
# The norms that need more than one position per example, so they work on images but not on vectors.
POSITION_NORMS = ("instance", "frn")


def build(norm: str, /, **options: Any) -> Callable[..., nn.Module] | None:
    """Returns a factory for norm layers, or None if `norm` is "none". Call it with `name`.

    Args:
        norm: a key of `NORMS`, or "none".
        options: values for fields of the classes in `NORMS`. Options that the chosen norm lacks are
            dropped, so the same options work for every norm.

    Raises:
        ValueError: if the norm is unknown.
        TypeError: if an option is not a field of any norm.

    >>> build("ghost", momentum=0.75, virtual_batch=16, groups=5)(name="norm").virtual_batch
    16
    """
    if norm not in (*NORMS, "none"):
        raise ValueError(f"there is no norm named {norm!r}; the norms are {', '.join(NORMS)}, none")
    known = set().union(*(_options(kind) for kind in NORMS.values()))
    if unknown := sorted(set(options) - known):
        raise TypeError(
            f"no norm has the options {unknown}; the options are {', '.join(sorted(known))}"
        )
    if norm == "none":
        return None
    own = _options(NORMS[norm])
    return partial(NORMS[norm], **{key: value for key, value in options.items() if key in own})


def _options(norm: type[nn.Module]) -> set[str]:
    """Returns the fields of a norm, except the two that every linen module has."""
    return {field.name for field in dataclasses.fields(norm)} - {"name", "parent"}
