"""Batch norms folded into the convolutions and dense layers beside them, wherever that is exact.

In evaluation a batch norm is y = g x + h for each channel, g = scale / sqrt(var + epsilon) and
h = bias - mean g, and so is a part of a linear layer that it stands next to.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.flow import Flow, Path, Way, flow
from bnjax.clinic.fold_pair import Place, folded, gain_and_offset
from bnjax.clinic.folded import LAYERS, Folded
from bnjax.clinic.layers import NORMS, NormLayer, norm_layers
from bnjax.norms import StandardizedConv
from bnjax.norms.per_example import PerExampleNorm, standardize
from bnjax.types import Batch, BatchStats, Logits, Params

PER_EXAMPLE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm, PerExampleNorm)
# Kernel and bias of a layer, in float64.
Weights = tuple[np.ndarray, np.ndarray]


class NormFold(NamedTuple):
    """What became of one norm.

    Attributes:
        norm: its path.
        layer: the path of the layer that it was folded into, None if it stays.
        place: where it stood.
        reason: why it stays.
    """

    norm: Path
    layer: Path | None = None
    place: Place | None = None
    reason: str = ""


class Folding(NamedTuple):
    """A folded network, and what became of each of its norms, in the order of their calls."""

    model: nn.Module
    params: Params
    batch_stats: BatchStats
    norms: tuple[NormFold, ...]


def fold(model: nn.Module, params: Params, batch_stats: BatchStats, batch: Batch) -> Folding:
    """Returns the network with its batch norms folded into its layers, as far as that is exact.

    What lies between a norm and a layer is read from the traced program, so that the model states
    nothing about itself. A norm is folded into the layer before it if nothing else reads that
    layer's output and only sums or maxima of one channel's values lie between, else into the layer
    after it under the same conditions; it stays, with the reason, through an activation, through
    zeros that a convolution pads with, and with a negative gain through a maximum. In float64 on
    the host.

    In evaluation the logits are the same but for rounding; `difference` says how nearly, and has to
    be asked where a module reads the kernel of another, as with tied weights, since this is not
    noticed. Training a folded network trains one without the folded norms.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        params: its weights.
        batch_stats: its running statistics.
        batch: `image` [n, h, w, c], of which only shape and dtype matter.
    """
    watched = flow(model, params, batch_stats, batch, _is_of_interest)
    layers = norm_layers(model, params, batch_stats, batch, train=False)
    about = {layer.path: layer for layer in layers}
    leaves, stats = flatten_dict(params), flatten_dict(batch_stats)
    weights: dict[Path, Weights] = {}
    norms = []
    for path, norm in watched.modules.items():
        if not isinstance(norm, (*NORMS, *PER_EXAMPLE)):
            continue
        if reason := _hindrance(norm, about.get(path), path in watched.computed):
            norms.append(NormFold(path, reason=reason))
            continue
        own = [leaves.get((*path, name)) for name in ("scale", "bias")]
        own += [stats[*path, name] for name in ("mean", "var")]
        reasons = []
        for place, neighbour in _NEIGHBOURS:
            link = neighbour(path, watched)
            if isinstance(link, Link):
                link = _moved(own, float(norm.epsilon), link, place, leaves, weights)
            if isinstance(link, Link):
                norms.append(NormFold(path, link.layer, place))
                break
            reasons.append(link)
        else:
            norms.append(NormFold(path, reason="; ".join(reasons)))
    pairs = tuple((one.norm, one.layer) for one in norms if one.layer is not None)
    if not pairs:
        return Folding(model, params, batch_stats, tuple(norms))
    for layer, pair in weights.items():
        for name, leaf in zip(("kernel", "bias"), pair, strict=True):
            leaves[*layer, name] = jnp.asarray(leaf, leaves[*layer, "kernel"].dtype)
    gone = {norm for norm, _ in pairs}
    params, batch_stats = (
        unflatten_dict({path: leaf for path, leaf in tree.items() if path[:-1] not in gone})
        for tree in (leaves, stats)
    )
    if isinstance(model, Folded):
        model, pairs = model.unfolded, (*model.pairs, *pairs)
    return Folding(Folded(model, pairs), params, batch_stats, tuple(norms))


def difference(logits: Logits, others: Logits) -> float:
    """Returns the largest difference between two sets of logits, in units of the largest logit.

    0 where both are 0, as of a network whose last layer was not trained.

    >>> difference(np.array([[4.0, -8.0]]), np.array([[4.0, -6.0]]))
    0.25
    >>> difference(np.zeros((1, 2)), np.zeros((1, 2)))
    0.0
    """
    one, other = np.asarray(logits, np.float64), np.asarray(others, np.float64)
    apart, size = (float(np.max(np.abs(of))) for of in (one - other, one))
    return apart / size if size else apart and np.inf


class Link(NamedTuple):
    """A layer that a norm may be folded into, and what lies between the two."""

    layer: Path
    module: Any
    way: Way


def _is_of_interest(module: Any) -> bool:
    if isinstance(module, NORMS):  # one that was folded before has no leaves
        return module.has_variable("batch_stats", "mean")
    return isinstance(module, (*LAYERS, *PER_EXAMPLE))


def _hindrance(norm: Any, about: NormLayer | None, computed: bool) -> str:
    """Returns why a norm can be folded into no layer whatever."""
    if about is None:
        return "its mean and variance are those of each example, and no constants"
    if about.by_batch:
        return "it normalises by the batch in evaluation too"
    if computed:
        return "what it uses is computed from its parameters"
    if type(norm).__call__ not in [kind.__call__ for kind in NORMS]:
        return f"it is a {type(norm).__name__}, which may do something else in evaluation"
    last = len(about.shape) - 1
    return "" if about.axes == tuple(range(last)) else "its channels are not the last axis alone"


def _before(norm: Path, watched: Flow) -> Link | str:
    """Returns the layer whose output a norm is given, or why there is none."""
    source = watched.sources[norm]
    if isinstance(source, str):
        return f"it is given {source}"
    way, name = watched.ways[source], ".".join(source)
    if isinstance(way, str):
        return f"it is given the output of {name}, which {way}"
    link = _link(source, watched, way)
    if isinstance(link, Link) and way.spread:
        return f"it has statistics of its own for each position of the output of {name}"
    return link


def _after(norm: Path, watched: Flow) -> Link | str:
    """Returns the layer that is given a norm's output, or why there is none."""
    way = watched.ways.get(norm, "goes nowhere")
    if isinstance(way, str):
        return f"its output {way}"
    if isinstance(watched.sources[way.end], str):
        return f"its output goes to {'.'.join(way.end)}, which is given {watched.sources[way.end]}"
    return _link(way.end, watched, way)


_NEIGHBOURS: tuple[tuple[Place, Callable[[Path, Flow], "Link | str"]], ...] = (
    ("after", _before),
    ("before", _after),
)


def _link(path: Path, watched: Flow, way: Way) -> Link | str:
    module = watched.modules[path]
    if path in watched.computed:
        return f"what {'.'.join(path)} uses is computed from its parameters"
    if type(module) not in LAYERS or getattr(module, "mask", None) is not None:
        return f"beside it is {'.'.join(path)}, a {type(module).__name__}"
    return Link(path, module, way)


def _moved(
    norm: Sequence[Any],
    epsilon: float,
    link: Link,
    place: Place,
    leaves: dict[Path, Any],
    weights: dict[Path, Weights],
) -> Link | str:
    """Folds a norm, in `weights`, or returns why it cannot be folded into this layer."""
    name, layer = ".".join(link.layer), link.module
    kernel, bias = map(np.copy, weights.get(link.layer) or _weights(link, leaves))
    # Under nn.scan and nn.vmap the first axes are of several norms and as many layers.
    stack, many = norm[-1].shape[:-1], kernel.shape[: kernel.ndim - _rank(layer)]
    if stack != many:
        return f"there are {list(stack)} norms and {list(many)} times {name}"
    factor = link.way.factor if place == "before" else 1 / link.way.factor
    groups = getattr(layer, "feature_group_count", 1)
    for index in np.ndindex(stack):
        scale, shift = (None if leaf is None else leaf[index] for leaf in norm[:2])
        mean, var = (leaf[index] for leaf in norm[2:])
        gain, offset = gain_and_offset(scale, shift, mean, var, epsilon)
        if not (np.isfinite(gain).all() and np.isfinite(offset).all()):
            return "its statistics are not finite, or a variance is negative"
        if link.way.maxima and (gain < 0).any():
            return f"between {name} and it a maximum is taken, and {(gain < 0).sum()} of its " + (
                f"{len(gain)} gains are negative"
            )
        if place == "before" and offset.any() and (zeros := _zeros(layer)):
            return f"{name}, which follows, {zeros}: before the norm these would not be zeros"
        kernel[index], bias[index] = folded(
            kernel[index], bias[index], gain, factor * offset, place, groups
        )
    dtype = leaves[*link.layer, "kernel"].dtype
    if not all(np.abs(leaf).max() <= jnp.finfo(dtype).max for leaf in (kernel, bias)):
        return f"the folded numbers of {name} are too large for {dtype}"
    weights[link.layer] = (kernel, bias)
    return link


def _weights(link: Link, leaves: dict[Path, Any]) -> Weights:
    """Returns the kernel that a layer uses, and its bias, 0 if it has none."""
    kernel, bias = leaves[*link.layer, "kernel"], leaves.get((*link.layer, "bias"))
    many = kernel.shape[: kernel.ndim - _rank(link.module)]
    if isinstance(link.module, StandardizedConv):
        used = standardize
        for _ in many:
            used = jax.vmap(used)
        kernel = used(kernel)
    zeros = np.zeros((*many, kernel.shape[-1]))
    return np.asarray(kernel, np.float64), zeros if bias is None else np.asarray(bias, np.float64)


def _rank(layer: Any) -> int:
    """Returns how many axes the kernel of one layer has."""
    return 2 if isinstance(layer, nn.Dense) else 2 + len(_sides(layer))


def _sides(layer: Any) -> tuple[int, ...]:
    sides = layer.kernel_size
    return (sides,) if isinstance(sides, int) else tuple(sides)


def _zeros(layer: Any) -> str:
    """Returns what zeros a layer adds to its input, and nothing if it adds none."""
    if isinstance(layer, nn.Dense):
        return ""
    padding = canonicalize_padding(layer.padding, len(_sides(layer)))
    dilation = layer.input_dilation
    if any(
        step not in (1, None)
        for step in (dilation if isinstance(dilation, Sequence) else [dilation])
    ):
        return "puts zeros between the values"
    if padding in ("VALID", "CIRCULAR", "REFLECT"):
        return ""
    none = (
        all(side == 1 for side in _sides(layer))
        if isinstance(padding, str)
        else not any(map(any, padding))
    )
    return "" if none else f"pads with zeros ({layer.padding})"
