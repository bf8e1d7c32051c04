"""What the fields and statistics of a batch norm mean in PyTorch and Keras, and here.

Measured, not read: `tests/norms/conventions.json` has what each framework stores.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.layers import NormLayer
from bnjax.clinic.layouts import Framework, PortError
from bnjax.types import BatchStats

# What the running variance is an average of: the batch's, divided by n or by n - 1. Keras 3; the
# fused kernel of TensorFlow, which Keras 2 uses for images, has the unbiased one, as torch.
STORED = {"torch": "unbiased", "keras": "biased"}


def norm_fields(framework: Framework, epsilon: float, momentum: Any) -> dict[str, Any]:
    """Returns the constructor's arguments of their batch norm.

    Args:
        framework: theirs.
        epsilon: added to the variance; the same everywhere.
        momentum: of ours, the fraction of the old average that is kept, as in Keras; torch's is one
            minus it. None is the mean of all batches, which Keras has not.

    Raises:
        PortError: for a momentum that they have not.

    >>> norm_fields("torch", 1e-3, 0.75)
    {'eps': 0.001, 'momentum': 0.25}
    """
    if callable(momentum) or (momentum is None and framework == "keras"):
        raise PortError(
            f"a norm with momentum = {momentum} has no counterpart in {framework}, where it is a "
            "number. Give the model one; evaluation does not depend on it."
        )
    if framework == "keras":
        return {"epsilon": epsilon, "momentum": momentum}
    return {"eps": epsilon, "momentum": None if momentum is None else _one_minus(momentum)}


def our_fields(framework: Framework, epsilon: float, momentum: float | None) -> dict[str, Any]:
    """Returns the arguments of `bnjax.norms.BatchNorm` that mean the same as theirs.

    Args:
        framework: theirs.
        epsilon: torch's `eps`, Keras' `epsilon`.
        momentum: theirs; None is torch's mean of all batches.

    >>> our_fields("torch", 1e-5, 0.1)
    {'epsilon': 1e-05, 'momentum': 0.9, 'variance': 'unbiased'}
    """
    if framework == "torch" and momentum is not None:
        momentum = _one_minus(momentum)
    return {"epsilon": epsilon, "momentum": momentum, "variance": STORED[framework]}


def variance_factor(stored: str, wanted: str, n: int) -> float:
    """Returns what turns a variance that was stored in one way into that of another.

    Exact for an average that has forgotten its initial value: each update was of n values.

    Args:
        stored: "biased", divided by n, or "unbiased", by n - 1.
        wanted: likewise.
        n: the values per channel of a training batch, at least 2.

    >>> variance_factor("unbiased", "biased", 8)
    0.875
    """
    if n < 2:
        raise PortError(f"a variance of {n} value per channel has no unbiased form: n is 2 or more")
    return {("biased", "unbiased"): n / (n - 1), ("unbiased", "biased"): (n - 1) / n}.get(
        (stored, wanted), 1.0
    )


def convert_variance(
    batch_stats: BatchStats,
    layers: Iterable[NormLayer],
    examples: int,
    *,
    stored: str | None = None,
    wanted: str | None = None,
) -> BatchStats:
    """Returns running statistics whose variances are what `wanted` says instead of `stored`.

    Evaluation takes the running variance as it is, so that this changes the logits, by as much as
    1 / n changes a variance: they become what they would be, had the network been trained in the
    other framework. For equal logits leave the numbers as they are, and whoever trains on forgets
    the difference with the average.

    Args:
        batch_stats: the averages.
        layers: from `norm_layers`: what each stores, and how many values an example gives it.
        examples: that a training batch had, on all devices over which the statistics were taken;
            n is this times the positions.
        stored: "biased" or "unbiased"; None: what each norm here stores.
        wanted: likewise.

    Raises:
        PortError: for a norm that does not reduce over the examples, or n = 1.
    """
    leaves = flatten_dict(batch_stats)
    for layer in layers:
        if 0 not in layer.axes:
            raise PortError(f"the norm {layer.name} does not reduce over the examples of a batch")
        positions = math.prod(layer.shape[axis] for axis in layer.axes if axis != 0)
        factor = variance_factor(
            stored or layer.variance, wanted or layer.variance, examples * positions
        )
        path = (*layer.path, "var")
        leaves[path] = (leaves[path] * factor).astype(jnp.result_type(leaves[path]))
    return unflatten_dict(leaves)


def _one_minus(momentum: float) -> float:
    """Returns 1 - momentum without the digits that binary numbers add to it."""
    return float(f"{1 - momentum:.12g}")
