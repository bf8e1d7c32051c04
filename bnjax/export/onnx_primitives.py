"""What each primitive of JAX is in ONNX."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from onnx import helper

from bnjax.export.onnx_graph import Graph, Value
from bnjax.export.onnx_layers import (
    Writer,
    check,
    convolution,
    dot_general,
    integers,
    is_symbolic,
    pooling,
    transposed,
)
from bnjax.export.onnx_parts import concatenate, cut, gather, pad, reverse, split


def _same(graph: Graph, operation: Any, *inputs: Value) -> Sequence[Value]:
    return inputs


def _plain(op: str) -> Writer:
    """Returns the writer of a primitive that is one operator."""
    return lambda graph, operation, *inputs: [graph.add(op, *inputs)]


def _chain(first: str, *then: str) -> Writer:
    """Returns the writer of a primitive that is one operator after the other."""

    def write(graph: Graph, operation: Any, *inputs: Value) -> Sequence[Value]:
        value = graph.add(first, *inputs)
        for op in then:
            value = graph.add(op, value)
        return [value]

    return write


def _one(operation: Any, number: float = 1) -> np.ndarray:
    return np.asarray(number, operation.outvars[0].aval.dtype)


def _maximum(graph: Graph, operation: Any, x: Value, y: Value) -> Sequence[Value]:
    for one, other in ((x, y), (y, x)):
        if isinstance(other, np.ndarray) and other.size == 1 and not other.any():
            return [graph.add("Relu", one)]
    return [graph.add("Max", x, y)]


def _integer_pow(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    power, value = operation.params["y"], x
    if not 2 <= power <= 4:
        return [graph.add("Pow", x, _one(operation, power))]
    for _ in range(power - 1):
        value = graph.add("Mul", value, x)
    return [value]


def _square(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    return [graph.add("Mul", x, x)]


def _erfc(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    return [graph.add("Sub", _one(operation), graph.add("Erf", x))]


def _expm1(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    return [graph.add("Sub", graph.add("Exp", x), _one(operation))]


def _log1p(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    return [graph.add("Log", graph.add("Add", x, _one(operation)))]


def _clamp(graph: Graph, operation: Any, low: Value, x: Value, high: Value) -> Sequence[Value]:
    return [graph.add("Min", graph.add("Max", x, low), high)]


def _select_n(graph: Graph, operation: Any, which: Value, *cases: Value) -> Sequence[Value]:
    check(operation.invars[0].aval.dtype == bool and len(cases) == 2, "among more than two cases")
    return [graph.add("Where", which, cases[1], cases[0])]


def _convert(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    old, new = operation.invars[0].aval.dtype, operation.params["new_dtype"]
    if old == new:
        return [x]
    check(new != jnp.bfloat16, "to bfloat16")
    return [graph.add("Cast", x, to=helper.np_dtype_to_tensor_dtype(np.dtype(new)))]


def _transpose(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    return [transposed(graph, x, operation.params["permutation"])]


def _reduction(op: str) -> Writer:
    def write(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
        return [graph.add(op, x, integers(operation.params["axes"]), keepdims=0)]

    return write


def _reshaped(graph: Graph, x: Value, shape: Sequence[Any]) -> str:
    """Adds a reshape, one size of which may depend on the batch."""
    check(sum(map(is_symbolic, shape)) <= 1, f"to {tuple(shape)}, two sizes of the batch")
    return graph.add("Reshape", x, integers([-1 if is_symbolic(one) else one for one in shape]))


def _reshape(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    check(operation.params["dimensions"] is None, "in another order")
    return [_reshaped(graph, x, operation.params["new_sizes"])]


def _squeeze(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    return [graph.add("Squeeze", x, integers(operation.params["dimensions"]))]


def _broadcast(graph: Graph, operation: Any, x: Value, *_: Value) -> Sequence[Value]:
    shape, places = operation.params["shape"], operation.params["broadcast_dimensions"]
    old = operation.invars[0].aval.shape
    middle: list[Any] = [1] * len(shape)
    for place, size in zip(places, old, strict=True):
        middle[place] = size
    if tuple(middle) != tuple(old):
        x = x.reshape(middle) if isinstance(x, np.ndarray) else _reshaped(graph, x, middle)
    if tuple(middle) == tuple(shape):
        return [x]
    # Expand leaves an axis as it is where it is asked for 1.
    wanted = [1 if mine == its else its for mine, its in zip(middle, shape, strict=True)]
    if not any(map(is_symbolic, wanted)):
        return [graph.add("Expand", x, integers(wanted))]
    parts: list[Value] = []
    for size in wanted:
        if is_symbolic(size):
            check(str(size) == "batch", f"to {size}")
        parts.append(graph.batch() if is_symbolic(size) else integers([size]))
    return [graph.add("Expand", x, graph.add("Concat", *parts, axis=0))]


def _dim_as_value(graph: Graph, operation: Any) -> Sequence[Value]:
    """Writes the number of images as a number that is computed with."""
    check(str(operation.params["dim"]) == "batch", f"of {operation.params['dim']}")
    to = helper.np_dtype_to_tensor_dtype(operation.outvars[0].aval.dtype)
    return [graph.add("Cast", graph.add("Squeeze", graph.batch()), to=to)]


PRIMITIVES: dict[str, Writer] = {
    **dict.fromkeys(("copy", "copy_p", "name", "optimization_barrier", "stop_gradient"), _same),
    **{
        name: _plain(op)
        for name, op in {
            "add": "Add",
            "add_any": "Add",
            "sub": "Sub",
            "mul": "Mul",
            "div": "Div",
            "pow": "Pow",
            "min": "Min",
            "neg": "Neg",
            "abs": "Abs",
            "sign": "Sign",
            "exp": "Exp",
            "log": "Log",
            "sqrt": "Sqrt",
            "tanh": "Tanh",
            "logistic": "Sigmoid",
            "erf": "Erf",
            "sin": "Sin",
            "cos": "Cos",
            "floor": "Floor",
            "ceil": "Ceil",
            "eq": "Equal",
            "gt": "Greater",
            "lt": "Less",
            "ge": "GreaterOrEqual",
            "le": "LessOrEqual",
            "and": "And",
            "or": "Or",
            "xor": "Xor",
            "not": "Not",
        }.items()
    },
    "ne": _chain("Equal", "Not"),
    "rsqrt": _chain("Sqrt", "Reciprocal"),
    "max": _maximum,
    "integer_pow": _integer_pow,
    "square": _square,
    "erfc": _erfc,
    "expm1": _expm1,
    "log1p": _log1p,
    "clamp": _clamp,
    "select_n": _select_n,
    "convert_element_type": _convert,
    "conv_general_dilated": convolution,
    "dot_general": dot_general,
    "reduce_window_max": pooling("MaxPool"),
    "reduce_window_sum": pooling("AveragePool"),
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_prod": _reduction("ReduceProd"),
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "transpose": _transpose,
    "dim_as_value": _dim_as_value,
    "concatenate": concatenate,
    "slice": cut,
    "rev": reverse,
    "pad": pad,
    "split": split,
    "gather": gather,
}
