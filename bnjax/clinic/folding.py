"""Folds batch norms into neighbouring layers."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.linear import canonicalize_padding
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.extend import core

from bnjax.clinic.jaxpr import Node, Path, layers
from bnjax.clinic.network import Call, Network, NormLayer, SameNetwork
from bnjax.norms import StandardizedConv
from bnjax.norms.per_example import standardize
from bnjax.types import Array, Images, Logits

# The position of the norm relative to the layer.
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
    channels_first: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel and bias of a layer that replaces a layer and its norm in evaluation.

    Let g = scale / sqrt(var + epsilon). If the norm follows the layer, the new weights are
    kernel' = kernel g and bias' = (bias - mean) g + shift for each output. If the norm precedes the
    layer, they are kernel' = g kernel for each input, and bias' = bias + sum over inputs of
    kernel (shift - mean g), which is exact only without padding.

    Args:
        kernel: [..., in / groups, out], as in Flax.
        bias: [out]; None for 0.
        scale, shift: the affine parameters of the norm, [c]; None for 1 and 0.
        mean, var: the running statistics of the norm, [c].
        epsilon: the constant added to the variance.
        norm: the position of the norm. "after": c = out. "before": `c` equals `in`, or a divisor
            of `in` if positions were flattened into channels; input j then belongs to channel
            j mod c.
        groups: the `feature_group_count` of a convolution.
        channels_first: whether channels came before positions in the flattening; input j then
            belongs to channel j // (in / c).

    Returns:
        The kernel and the bias in the dtype of the kernel, computed in float64.

    Raises:
        ValueError: if the numbers of channels do not match, or var + epsilon is not above 0.

    >>> one, two = np.ones(1), np.full(1, 2.0)
    >>> fold_pair(np.ones((1, 1)), None, two, one, 3 * one, one, 3.0, norm="after")
    (array([[1.]]), array([-2.]))
    """

    def exact(leaf: Array | None, default: float = 0.0) -> np.ndarray:
        return np.asarray(default if leaf is None else leaf, np.float64)

    with np.errstate(divide="ignore", invalid="ignore"):
        gain = exact(scale, 1.0) / np.sqrt(exact(var) + epsilon)
        offset = exact(shift) - exact(mean) * gain
    if not np.isfinite([gain, offset]).all():
        raise ValueError("the norm's statistics are not finite, or a variance is negative")
    weight, channels = exact(kernel), len(gain)
    inputs, outputs = weight.shape[-2] * groups, weight.shape[-1]
    if norm == "after":
        if channels != outputs:
            raise ValueError(
                f"the norm has {channels} channels, but the layer has {outputs} outputs"
            )
        weight, added = weight * gain, gain * exact(bias) + offset
    else:
        if inputs % channels:
            raise ValueError(f"the norm has {channels} channels, but the layer has {inputs} inputs")

        def of_weights(values: np.ndarray) -> np.ndarray:
            """Returns for each weight the value of its input channel, [in / groups, out]."""
            spread = np.repeat if channels_first else np.tile
            by_group = spread(values, inputs // channels).reshape(groups, -1).T
            return np.repeat(by_group, outputs // groups, axis=1)

        added = exact(bias) + (weight * of_weights(offset)).reshape(-1, outputs).sum(0)
        weight = weight * of_weights(gain)
    return weight.astype(kernel.dtype), added.astype(kernel.dtype)


class NormFold(NamedTuple):
    """The result of folding one norm.

    Attributes:
        norm: the path of the norm.
        layer: the path of the layer it was folded into; None if it was not folded.
        place: the position of the norm relative to the layer.
        reason: the reason for not folding the norm; empty if it was folded.
    """

    norm: Path
    layer: Path | None = None
    place: Place | None = None
    reason: str = ""


class Folding(NamedTuple):
    """A folded network, and the result for each norm in the order of calls."""

    network: Any
    norms: tuple[NormFold, ...]

    @property
    def pairs(self) -> tuple[tuple[Path, Path], ...]:
        """For each norm folded by this call, its path and the path of its layer."""
        return tuple((one.norm, one.layer) for one in self.norms if one.layer is not None)


def fold(network: SameNetwork, images: Images) -> SameNetwork:
    """Folds the batch norms of a network into its layers wherever folding is exact.

    The arguments are those of `plan`, which also returns the result for each norm.
    """
    return plan(network, images).network


def plan(network: Network, images: Images) -> Folding:
    """Returns the folded network, and the result of folding for each norm.

    A norm is folded into the layer before it if nothing else reads the output of that layer, and
    only sums and maxima within a channel, positive factors and moves of values lie between the two.
    Otherwise it is folded into the layer after it, under the same conditions. A norm cannot be
    folded across an activation, into a following convolution with zero padding, or across a maximum
    if the gain is negative. `plan` finds the operations in the traced program, and computes in
    float64 on the host.

    In evaluation the logits are unchanged except for rounding errors. If one module reads the
    kernel of another (tied weights), check the logits with `difference`, because `plan` does not
    detect tied weights.

    Args:
        network: a network, for instance from `bnjax.clinic.linen`.
        images: [n, h, w, c]; only the shape and dtype matter.
    """
    batch = {"image": images}
    calls: dict[Path, list[Node]] = {}
    for node in layers(network, batch, train=False, chosen=_is_of_interest):
        if node.call is not None:
            calls.setdefault(node.path, []).append(node)
    origins = {}
    for path, nodes in calls.items():
        origins[path], *others = {_origin(node, network.per_example) for node in nodes}
        if others:
            origins[path] = Origin(reason="differs between its calls")
    about = {layer.path: layer for layer in network.norms(batch)}
    leaves, stats = flatten_dict(network.params), flatten_dict(network.batch_stats)
    weights: dict[Path, Weights] = {}
    norms = []
    for path, nodes in calls.items():
        norm = nodes[0]
        if not norm.call.is_norm:
            continue
        reasons = [_hindrance(nodes, about[path], network.per_example)]
        places: tuple[Place, ...] = () if reasons[0] else ("after", "before")
        for place in places:
            try:
                layer, origin = _neighbour(calls, origins, path, place)
                before = weights.get(layer.path) or _weights(layer, leaves)
                weights[layer.path] = _with_norm(
                    before, layer, about[path], place, origin, leaves | stats, network.per_example
                )
            except ValueError as error:
                reasons.append(str(error))
            else:
                norms.append(NormFold(path, layer.path, place))
                break
        else:
            norms.append(NormFold(path, reason="; ".join(filter(None, reasons))))
    folding = Folding(network, tuple(norms))
    if not folding.pairs:
        return folding
    for layer_path, pair in weights.items():
        dtype = leaves[*layer_path, "kernel"].dtype
        leaves[*layer_path, "kernel"], leaves[*layer_path, "bias"] = (
            jnp.asarray(leaf, dtype) for leaf in pair
        )
    gone = {norm_path for norm_path, _ in folding.pairs}
    params, batch_stats = (
        unflatten_dict({path: leaf for path, leaf in tree.items() if path[:-1] not in gone})
        for tree in (leaves, stats)
    )
    return folding._replace(network=network.folded(params, batch_stats, folding.pairs))


def difference(logits: Logits, others: Logits) -> float:
    """Returns the largest difference between logits, relative to the largest of the first ones.

    Returns 0 if all of them are 0, for instance because the last layer is untrained.

    >>> difference(np.array([[4.0, -8.0]]), np.array([[4.0, -6.0]]))
    0.25
    >>> difference(np.zeros((1, 2)), np.zeros((1, 2)))
    0.0
    """
    one, other = np.asarray(logits, np.float64), np.asarray(others, np.float64)
    apart, size = (float(np.max(np.abs(of))) for of in (one - other, one))
    return apart / size if size else apart and np.inf


def _is_of_interest(call: Call) -> bool:
    # A norm that is already folded has no leaves.
    return call.get("mean") is not None if call.is_norm else call.is_layer


def _hindrance(nodes: list[Node], about: NormLayer, per_example: bool) -> str:
    """Returns the reason a norm cannot be folded into any layer; empty without such a reason."""
    norm = nodes[0].call
    if about.by_batch:
        return "it normalises by batch statistics even in evaluation"
    if any(node.has_computed for node in nodes):
        return "it transforms its stored parameters"
    if not norm.is_standard:
        return f"it is a {norm.kind.__name__}, which may behave differently in evaluation"
    channels, where = (1, "second") if per_example else (len(about.shape) - 1, "last")
    others = tuple(axis for axis in range(len(about.shape)) if axis != channels)
    return "" if about.axes == others else f"it does not normalise over all axes except the {where}"


class Origin(NamedTuple):
    """The module that computes the input of a call, if no other call reads that module's output.

    The module and the call may be separated by a function f of sums and maxima within a channel.
    With a gain a >= 0 and a shift b per channel, f(a * x + b) = a * f(x) + factor * b.

    Attributes:
        path: the path of the module; None if there is no such module.
        factor: the factor in the equation above.
        has_maxima: whether f has a maximum; without a maximum the gain may be negative.
        reason: the reason there is no such module.
    """

    path: Path | None = None
    factor: float = 1.0
    has_maxima: bool = False
    reason: str = ""


def _origin(node: Node, per_example: bool) -> Origin:
    """Returns the origin of a call's input."""
    factor, has_maxima, kind = 1.0, False, ""
    while len(node.inputs) == 1:
        (node,) = node.inputs
        if node.call is None and node.equation is None:
            return Origin(reason="is the input of the network")
        if len(node.readers) > 1:
            readers = f"several operations read ({_readers(node)})"
            return Origin(reason=f"is the output of {_name(node)}, which {readers}")
        # After other operations, the output must have the shape that it has inside the module.
        # Otherwise `nn.vmap` added an axis, and the channel axis is unknown.
        if node.call is not None and (not kind or node.shape[per_example:] == node.returned):
            return Origin(node.path, factor, has_maxima)
        step = None if node.call is not None else _step(node.equation, per_example)
        if step is None:
            return Origin(reason=f"is the output of {_name(node)}")
        factor, has_maxima, kind = factor * step[0], has_maxima or step[1], node.kind
    return Origin(reason="is computed from several values")


def _name(node: Node) -> str:
    return node.kind if node.call is None else ".".join(node.path)


def _readers(node: Node) -> str:
    return ", ".join(map(_name, node.readers))


def _neighbour(
    calls: dict[Path, list[Node]], origins: dict[Path, Origin], norm: Path, place: Place
) -> tuple[Node, Origin]:
    """Returns the layer next to a norm, and the origin; raises ValueError if none is usable."""
    if place == "after":
        origin, path = origins[norm], origins[norm].path
        if path is None:
            raise ValueError(f"its input {origin.reason}")
    else:
        path = next((path for path, one in origins.items() if one.path == norm), None)
        if path is None:
            readers = _readers(calls[norm][0])
            raise ValueError(
                f"its output is not the input of a single layer: it is read by {readers}"
            )
        origin = origins[path]
    layer = calls[path][0]
    if len(calls[path]) != len(calls[norm]):
        raise ValueError(f"{_name(layer)} is called both with and without the norm")
    if any(node.has_computed for node in calls[path]):
        raise ValueError(f"{_name(layer)} transforms its stored parameters")
    is_exact = layer.call.is_layer and layer.call.is_standard
    if not is_exact or getattr(layer.call.module, "mask", None) is not None:
        raise ValueError(f"its neighbour {_name(layer)} is a {layer.kind}, which is not supported")
    return layer, origin


# The result of `_step` for operations that only move values.
MOVED = (1.0, False)


def _step(equation: Any, per_example: bool) -> tuple[float, bool] | None:
    """Returns `factor` and `has_maxima` of an operation; None if a norm cannot move past it.

    A norm can move past sums and maxima within a channel, multiplication by a constant above 0, and
    operations that only move values.
    """
    kind, params = equation.primitive.name, equation.params
    operands = [atom for atom in equation.invars if isinstance(atom, core.Var)]
    if len(operands) != 1 or len(equation.outvars) != 1:
        return None
    avals: list[Any] = [operands[0].aval, equation.outvars[0].aval]
    given, returned = (aval.shape for aval in avals)
    # The channel axis. For networks called per example, only the axis of examples precedes it.
    channels = 1 if per_example else len(given) - 1
    if kind in ("copy", "name", "convert_element_type"):
        floats = all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals)
        return MOVED if floats else None
    if min(len(given), len(returned)) <= per_example:
        return None
    if kind in ("mul", "div") and len(equation.invars) == 2:
        first, second = equation.invars
        if kind == "div" and first is not operands[0]:
            return None
        number = float((first if second is operands[0] else second).val)
        return (number if kind == "mul" else 1 / number, False) if number > 0 else None
    if kind == "transpose":
        return MOVED if params["permutation"][channels] == channels else None
    fixed = {0, 1} if per_example else {channels}
    if kind == "squeeze":
        return MOVED if fixed.isdisjoint(params["dimensions"]) else None
    if kind == "reshape" and params["dimensions"] is None:
        if per_example:
            return MOVED if returned[0] == given[0] and returned[1] % given[1] == 0 else None
        return MOVED if returned[-1] % given[-1] == 0 else None
    # Sums and maxima over positions and examples, not over channels.
    if kind in ("reduce_sum", "reduce_max") and fixed.isdisjoint(params["axes"]):
        count = math.prod(given[axis] for axis in params["axes"])
    elif kind in ("reduce_window_sum", "reduce_window_max"):
        window, padding = params["window_dimensions"], params["padding"]
        steps = (window[channels], params["window_strides"][channels], *params["base_dilation"])
        # Padding adds zeros to a sum, but does not affect a maximum.
        padded = any(map(any, padding if kind == "reduce_window_sum" else [padding[channels]]))
        if padded or any(step != 1 for step in steps):
            return None
        count = math.prod(window)
    else:
        return None
    return (1.0, True) if kind.endswith("max") else (float(count), False)


# The kernel and bias of a layer, float64.
Weights = tuple[np.ndarray, np.ndarray]


def _with_norm(
    weights: Weights,
    layer: Node,
    norm: NormLayer,
    place: Place,
    origin: Origin,
    stored: dict[Path, Any],
    per_example: bool,
) -> Weights:
    """Returns the weights with a norm folded in; raises ValueError if folding is not exact."""
    name, module = ".".join(layer.path), layer.call.module
    kernel, bias = map(np.copy, weights)
    var = np.asarray(stored[*norm.path, "var"])
    defaults = {"scale": np.ones(var.shape), "bias": np.zeros(var.shape), "mean": None}
    scale, shift, mean = (
        np.asarray(stored.get((*norm.path, leaf), default), np.float64)
        for leaf, default in defaults.items()
    )
    # With nn.scan and nn.vmap the leading axes enumerate the stacked norms and layers.
    stack, many = var.shape[:-1], kernel.shape[: kernel.ndim - _rank(module)]
    if stack != many:
        raise ValueError(f"the stacked axes of the norms are {[*stack]}, those of {name} {[*many]}")
    if origin.has_maxima and (scale < 0).any():
        raise ValueError(
            f"some gains are negative, and there is a maximum between the norm and {name}"
        )
    if place == "before" and (shift.any() or mean.any()) and _adds_zeros(module):
        raise ValueError(
            f"{name} adds zeros to its input, so its bias cannot absorb the norm's shift"
        )
    factor = origin.factor if place == "before" else 1 / origin.factor
    for index in np.ndindex(stack):
        kernel[index], bias[index] = fold_pair(
            kernel[index],
            bias[index],
            scale[index],
            factor * shift[index],
            factor * mean[index],
            var[index],
            float(norm.module.epsilon),
            norm=place,
            groups=getattr(module, "feature_group_count", getattr(module, "groups", 1)),
            channels_first=per_example,
        )
    return kernel, bias


def _weights(layer: Node, stored: dict[Path, Any]) -> Weights:
    """Returns a layer's kernel, standardised if the layer does so, and its bias or zeros."""
    kernel, bias = stored[*layer.path, "kernel"], stored.get((*layer.path, "bias"))
    many = kernel.shape[: kernel.ndim - _rank(layer.call.module)]
    if isinstance(layer.call.module, StandardizedConv):
        used = standardize
        for _ in many:
            used = jax.vmap(used)
        kernel = used(kernel)
    zeros = np.zeros((*many, kernel.shape[-1]))
    return np.asarray(kernel, np.float64), zeros if bias is None else np.asarray(bias, np.float64)


def _rank(layer: Any) -> int:
    """Returns the number of axes of a layer's kernel."""
    return 2 + np.size(getattr(layer, "kernel_size", ()))


def _adds_zeros(layer: Any) -> bool:
    """Returns whether a layer pads its input with zeros or dilates it."""
    if not hasattr(layer, "kernel_size"):
        return False
    padding = canonicalize_padding(layer.padding, _rank(layer) - 2)
    if padding in ("SAME", "CAUSAL"):
        padding = [tuple(np.not_equal(layer.kernel_size, 1).reshape(-1))]
    dilation = getattr(layer, "input_dilation", None) or 1
    is_dilated = bool(np.not_equal(dilation, 1).any())
    return is_dilated or (not isinstance(padding, str) and any(map(any, padding)))
