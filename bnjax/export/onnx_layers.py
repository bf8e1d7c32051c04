"""Convolutions, products and pooling in ONNX, and what writers of primitives share."""

import math
import string
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from jax import export

from bnjax.export.onnx_graph import Graph, Value

# Given the graph, the operation (`params`, `invars` and `outvars`, which have shapes and dtypes)
# and its inputs, it returns the outputs.
Writer = Callable[..., Sequence[Value]]


class UnknownError(Exception):
    """A primitive is used in a way that has no writer; the text goes on after its name."""


def check(fits: bool, otherwise: str) -> None:
    """Raises UnknownError if something does not fit."""
    if not fits:
        raise UnknownError(otherwise)


def is_symbolic(size: Any) -> bool:
    """Returns whether a size depends on how many images there are."""
    return export.is_symbolic_dim(size)


def integers(values: Iterable[Any]) -> np.ndarray:
    """Returns numbers as ONNX wants axes and sizes, int64 [n]."""
    return np.array([*map(int, values)], np.int64)


def convolution(graph: Graph, operation: Any, x: Value, kernel: Value) -> Sequence[Value]:
    """Writes `conv_general_dilated`."""
    params = operation.params
    padding = [tuple(map(int, sides)) for sides in params["padding"]]
    check(set(params["lhs_dilation"]) <= {1}, "with a dilated input (a transposed convolution)")
    check(params["batch_group_count"] == 1, "with groups of the batch")
    check(min(map(min, padding), default=0) >= 0, "with negative padding")
    orders = params["dimension_numbers"]
    out = graph.add(
        "Conv",
        transposed(graph, x, orders.lhs_spec),
        transposed(graph, kernel, orders.rhs_spec),
        kernel_shape=[operation.invars[1].aval.shape[axis] for axis in orders.rhs_spec[2:]],
        strides=[*params["window_strides"]],
        dilations=[*params["rhs_dilation"]],
        pads=[side[0] for side in padding] + [side[1] for side in padding],
        group=params["feature_group_count"],
    )
    return [transposed(graph, out, inverse(orders.out_spec))]


def transposed(graph: Graph, x: Value, order: Sequence[int]) -> Value:
    """Returns a value with its axes in another order."""
    order = [*map(int, order)]
    if order == sorted(order):
        return x
    if isinstance(x, np.ndarray):
        return np.ascontiguousarray(x.transpose(order))
    return graph.add("Transpose", x, perm=order)


def inverse(order: Sequence[int]) -> list[int]:
    """Returns the order that undoes another.

    >>> inverse([2, 0, 1])
    [1, 2, 0]
    """
    return [*map(int, np.argsort(order))]


def dot_general(graph: Graph, operation: Any, x: Value, y: Value) -> Sequence[Value]:
    """Writes `dot_general`."""
    (of_x, of_y), (batch_x, batch_y) = operation.params["dimension_numbers"]
    ranks = [len(variable.aval.shape) for variable in operation.invars]
    wanted = operation.outvars[0].aval.dtype
    check(operation.invars[0].aval.dtype == wanted, f"whose result is {wanted}")
    if not batch_x and ranks[1] == 2 and (*of_x, *of_y) == (ranks[0] - 1, 0):
        return [graph.add("MatMul", x, y)]
    letters = iter(string.ascii_letters)
    left: list[str] = [next(letters) for _ in range(ranks[0])]
    right: list[str] = [next(letters) for _ in range(ranks[1])]
    for mine, its in zip((*of_x, *batch_x), (*of_y, *batch_y), strict=True):
        right[its] = left[mine]
    free = [one for axis, one in enumerate(left) if axis not in (*of_x, *batch_x)]
    free += [one for axis, one in enumerate(right) if axis not in (*of_y, *batch_y)]
    out = [left[axis] for axis in batch_x] + free
    equation = f"{''.join(left)},{''.join(right)}->{''.join(out)}"
    return [graph.add("Einsum", x, y, equation=equation)]


def pooling(op: str) -> Writer:
    """Returns the writer of a `reduce_window` that is this operator."""

    def write(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
        params = operation.params
        window, steps = params["window_dimensions"], params["window_strides"]
        padding, holes = params["padding"], params["window_dilation"]
        check(set(params["base_dilation"]) <= {1}, "with a dilated input")
        check(op == "MaxPool" or set(holes) <= {1}, "with a dilated window")
        about = [*zip(window, steps, padding, strict=True)]
        still = [axis for axis, one in enumerate(about) if one == (1, 1, (0, 0))]
        # Operators pool all axes but the first two.
        check(len(still) >= 2 and len(about) >= 3, "over more axes than ONNX pools")
        first = [still[0], still[-1]]
        pooled = [axis for axis in range(len(about)) if axis not in first]
        order = [*first, *pooled]
        attributes: dict[str, Any] = {
            "kernel_shape": [window[axis] for axis in pooled],
            "strides": [steps[axis] for axis in pooled],
            "pads": [padding[axis][0] for axis in pooled] + [padding[axis][1] for axis in pooled],
        }
        if op == "MaxPool":
            attributes["dilations"] = [holes[axis] for axis in pooled]
        else:  # a sum is the mean times the window, zeros of the padding included
            attributes["count_include_pad"] = 1
        out: Value = graph.add(op, transposed(graph, x, order), **attributes)
        if op == "AveragePool":
            out = graph.add(
                "Mul", out, np.asarray(math.prod(window), operation.outvars[0].aval.dtype)
            )
        return [transposed(graph, out, inverse(order))]

    return write
