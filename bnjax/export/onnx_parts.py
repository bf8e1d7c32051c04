"""Parts of arrays, and arrays of parts, in ONNX."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from bnjax.export.onnx_graph import Graph, Value
from bnjax.export.onnx_layers import UnknownError, check, integers, is_symbolic, transposed


def concatenate(graph: Graph, operation: Any, *inputs: Value) -> Sequence[Value]:
    """Writes `concatenate`."""
    return [graph.add("Concat", *inputs, axis=operation.params["dimension"])]


def cut(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    """Writes `slice`."""
    params, shape = operation.params, operation.invars[0].aval.shape
    starts, ends = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or [1] * len(shape)
    whole = [*zip([0] * len(shape), shape, [1] * len(shape), strict=True)]
    cuts = [*zip(starts, ends, steps, strict=True)]
    axes = [axis for axis, one in enumerate(cuts) if one != whole[axis]]
    chosen = [[sizes[axis] for axis in axes] for sizes in (starts, ends, steps)]
    check(not any(map(is_symbolic, itertools.chain(*chosen))), "along the batch")
    starts, ends, steps = map(integers, chosen)
    return [graph.add("Slice", x, starts, ends, integers(axes), steps)] if axes else [x]


def reverse(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    """Writes `rev`: a slice from the last value of an axis to before its first."""
    axes = operation.params["dimensions"]
    back, before = integers([-1] * len(axes)), integers([np.iinfo(np.int64).min] * len(axes))
    return [graph.add("Slice", x, back, before, integers(axes), back)]


def pad(graph: Graph, operation: Any, x: Value, filling: Value) -> Sequence[Value]:
    """Writes `pad`."""
    config = operation.params["padding_config"]
    check(
        all(low >= 0 and high >= 0 and inner == 0 for low, high, inner in config),
        "between the values or by less than nothing",
    )
    sides = integers([side[0] for side in config] + [side[1] for side in config])
    return [graph.add("Pad", x, sides, filling)]


def split(graph: Graph, operation: Any, x: Value) -> Sequence[Value]:
    """Writes `split`."""
    sizes, axis = operation.params["sizes"], operation.params["axis"]
    return graph.add_many("Split", len(sizes), x, integers(sizes), axis=axis)


def gather(graph: Graph, operation: Any, x: Value, places: Value) -> Sequence[Value]:
    """Writes `gather` as indexing makes it, at places that depend on no image."""
    params, shape = operation.params, operation.invars[0].aval.shape
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    at, gone = numbers.start_index_map, numbers.collapsed_slice_dims
    if not isinstance(places, np.ndarray) or numbers.operand_batching_dims:
        raise UnknownError("by values")
    check(not any(map(is_symbolic, [shape[axis] for axis in at])), "along the batch")
    whole = all(sizes[axis] == shape[axis] for axis in range(len(shape)) if axis not in at)
    room = [shape[axis] - sizes[axis] for axis in at]
    check(
        whole and bool(((places >= 0) & (places <= np.array(room))).all()), "outside of the array"
    )
    if places.ndim == 1:  # one part
        ends = [place + sizes[axis] for place, axis in zip(places, at, strict=True)]
        out = graph.add("Slice", x, integers(places), integers(ends), integers(at))
        return [graph.add("Squeeze", out, integers(gone)) if gone else out]
    check({*at} == {*gone}, "of several parts longer than 1")
    rest = [axis for axis in range(len(shape)) if axis not in at]
    out = graph.add("GatherND", transposed(graph, x, [*at, *rest]), places.astype(np.int64))
    # It has the axes of the places first, and then those of the parts.
    first = iter(range(places.ndim - 1))
    order = [
        places.ndim - 1 + numbers.offset_dims.index(axis)
        if axis in numbers.offset_dims
        else next(first)
        for axis in range(len(operation.outvars[0].aval.shape))
    ]
    return [transposed(graph, out, order)]
