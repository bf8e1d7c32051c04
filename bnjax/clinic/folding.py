"""Folding batch norms into the layers beside them."""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype
from flax.linen.linear import canonicalize_padding
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.jaxpr import Flow, Path, Way, flow
from bnjax.clinic.linen import NORMS, Network, NormLayer
from bnjax.norms import StandardizedConv
from bnjax.norms.per_example import PerExampleNorm, standardize
from bnjax.types import Array, Images, Logits, Mask

# By their exact types: a subclass may do something else with its kernel.
LAYERS = (nn.Conv, nn.Dense, StandardizedConv)


class Folded(nn.Module):
    """A network without the norms that were folded into its layers.

    Its parameters keep their names. Folded norms return their input and have no leaves; their
    layers have a bias, and use a standardised kernel as it is stored.

    Attributes:
        unfolded: the network with its norms.
        pairs: the paths of each folded norm and of the layer that has it now.
    """

    unfolded: nn.Module
    pairs: Sequence[tuple[Path, Path]]

    @nn.compact
    def __call__(self, x: Images, *, train: bool, mask: Mask | None = None) -> Logits:
        """Returns the logits [n, classes] of images [n, h, w, c]."""
        # In this module's own scope, so that the leaves keep their names.
        model = self.unfolded.copy(parent=self.scope, name=None)
        norms, layers = ({tuple(path) for path in side} for side in zip(*self.pairs, strict=True))

        def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, path = context.module, context.module.path[len(self.path) :]
            if context.method_name == "__call__" and path in norms and isinstance(module, NORMS):
                return _unchanged(module, *args, **kwargs)
            if context.method_name == "__call__" and path in layers and _lacks_bias(module):
                return _with_bias(module)(*args, **kwargs)
            return call(*args, **kwargs)

        takes_mask = "mask" in inspect.signature(type(self.unfolded).__call__).parameters
        options = {"mask": mask} if takes_mask else {}
        with nn.intercept_methods(intercept):
            return model(x, train=train, **options)


def _unchanged(norm: Any, x: Array, *_: Any, **__: Any) -> Array:
    """Returns the input in the dtype that the norm's output had."""
    affine = [jnp.zeros((), norm.param_dtype)] if norm.use_scale or norm.use_bias else []
    return x.astype(canonicalize_dtype(x, *affine, dtype=norm.dtype))


def _lacks_bias(layer: Any) -> bool:
    return type(layer) in LAYERS and (isinstance(layer, StandardizedConv) or not layer.use_bias)


def _with_bias(layer: Any) -> nn.Module:
    """Returns the layer with a bias and without standardisation, in the same place."""
    kind: Callable[..., nn.Module] = nn.Dense if isinstance(layer, nn.Dense) else nn.Conv
    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return kind(**fields | {"use_bias": True, "name": None, "parent": layer.scope})


# Where the norm stands: after the layer, or before it.
Place = Literal["after", "before"]


def fold_pair(
    kernel: Array,
    bias: Array | None,
    scale: Array | None,
    shift: Array | None,
    mean: Array,
    var: Array,
    epsilon: float,
    *,
    norm: Place,
    groups: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias of one layer that replaces layer and norm in evaluation.

    With the gain g = scale / sqrt(var + epsilon), a norm after the layer gives
    kernel' = kernel g and bias' = (bias - mean) g + shift, over the outputs; one before it gives
    kernel' = g kernel and bias' = bias + the sum of kernel (shift - mean g), over the inputs. The
    latter is exact only if the layer does not pad.

    Args:
        kernel: [..., in / groups, out], as Flax has it.
        bias: [out]; None for 0.
        scale, shift: of the norm, [c]; None for 1 and 0.
        mean, var: likewise; the variance is the one that the norm divides by.
        epsilon: added to the variance.
        norm: where the norm stands. "after": c = out. "before": c = in, or divides it where
            positions were flattened into channels, channels last: input j is of channel j mod c.
        groups: of a convolution, its `feature_group_count`.

    Returns:
        Both in the dtype of the kernel, computed in float64.

    Raises:
        ValueError: if the channels do not fit, or a variance with epsilon is not above 0.

    >>> one, two = np.ones(1), np.full(1, 2.0)
    >>> fold_pair(np.ones((1, 1)), None, two, one, 3 * one, one, 3.0, norm="after")
    (array([[1.]]), array([-2.]))
    """
    gain, offset = gain_and_offset(scale, shift, mean, var, epsilon)
    if not (np.isfinite(gain).all() and np.isfinite(offset).all()):
        raise ValueError("a variance with epsilon is not above 0, or the norm is not finite")
    weight, out = np.asarray(kernel, np.float64), kernel.shape[-1]
    own = np.zeros(out) if bias is None else np.asarray(bias, np.float64)
    weight, own = folded(weight, own, gain, offset, norm, groups)
    return weight.astype(kernel.dtype), own.astype(kernel.dtype)


def gain_and_offset(
    scale: Array | None, shift: Array | None, mean: Array, var: Array, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns g and h, float64 [c], of a norm that is y = g x + h; not finite if var is wrong."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = 1 / np.sqrt(np.asarray(var, np.float64) + epsilon)
        gain = gain if scale is None else gain * np.asarray(scale, np.float64)
        offset = -np.asarray(mean, np.float64) * gain
    return gain, offset if shift is None else offset + np.asarray(shift, np.float64)


def folded(
    kernel: np.ndarray,
    bias: np.ndarray,
    gain: np.ndarray,
    offset: np.ndarray,
    norm: Place,
    groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias with a norm y = gain x + offset folded in; all in float64.

    Arguments and errors as for `fold_pair`.
    """
    inputs, outputs, channels = kernel.shape[-2] * groups, kernel.shape[-1], len(gain)
    if norm == "after":
        if channels != outputs:
            raise ValueError(f"the norm has {channels} channels and the layer {outputs} outputs")
        return kernel * gain, bias * gain + offset
    if inputs % channels:
        raise ValueError(f"the norm has {channels} channels and the layer {inputs} inputs")

    def of_weights(values: np.ndarray) -> np.ndarray:
        """Spreads values of the channels over the kernel's inputs and outputs [in / groups, out].

        Each group of outputs has inputs of its own.
        """
        by_group = np.tile(values, inputs // channels).reshape(groups, -1).T
        return np.repeat(by_group, outputs // groups, axis=1)

    added = (kernel * of_weights(offset)).reshape(-1, outputs).sum(0)
    return kernel * of_weights(gain), bias + added


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

    network: Network
    norms: tuple[NormFold, ...]

    @property
    def pairs(self) -> Sequence[tuple[Path, Path]]:
        """The paths of all folded norms and of the layers that have them now."""
        return self.network.model.pairs if isinstance(self.network.model, Folded) else ()


def fold(network: Network, images: Images) -> Network:
    """Returns the network with its batch norms folded into its layers where that is exact.

    Arguments as for `plan`, which also returns what became of each norm.
    """
    return plan(network, images).network


def plan(network: Network, images: Images) -> Folding:
    """Returns the folded network, and for each norm the layer that has it or why it stays.

    The way from a norm to a layer is read from the traced program. A norm is folded into the layer
    before it if nothing else reads that layer's output and only sums or maxima of one channel's
    values lie between; else into the layer after it under the same conditions. It stays where an
    activation, zero padding of a convolution, or a maximum with a negative gain lies between.
    Computed in float64 on the host.

    In evaluation the logits are the same except for rounding; `difference` measures it. Measure it
    where a module reads the kernel of another, as with tied weights, which is not noticed here.

    Args:
        network: from `bnjax.clinic.linen`.
        images: [n, h, w, c]; only shape and dtype matter.
    """
    model, params, batch_stats = network.model, network.params, network.batch_stats
    batch = {"image": images}
    watched = flow(model, params, batch_stats, batch, _is_of_interest)
    about = {layer.path: layer for layer in network.norms(batch)}
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
        return Folding(network, tuple(norms))
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
    return Folding(Network(params, batch_stats, Folded(model, pairs)), tuple(norms))


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
