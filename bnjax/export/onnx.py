"""Translates the traced program of a network to ONNX."""

import json
import math
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax import export
from onnx import NodeProto, TensorProto, helper, numpy_helper

from bnjax.clinic.jaxpr import evaluate, traced
from bnjax.errors import UserError
from bnjax.train_step import forward
from bnjax.types import BatchStats, Params

# These versions are supported by onnxruntime 1.14 (2023) and newer.
OPSET = 18
IR_VERSION = 8
IMAGES, LOGITS = "images", "logits"
# A value in the program: an array if it does not depend on the images, otherwise the name of an
# output.
Value = np.ndarray | str


def onnx_model(
    model: nn.Module,
    params: Params,
    batch_stats: BatchStats,
    image_shape: tuple[int, int, int],
    notes: Mapping[str, Any] | None = None,
    image_dtype: Any = np.uint8,
) -> onnx.ModelProto:
    """Returns an ONNX model that evaluates the network.

    The model maps `images` [batch, h, w, c] to `logits` [batch, classes].

    Args:
        model: any linen module with `__call__(x, train=...)` and float32 arithmetic.
        params: the weights of the model.
        batch_stats: the running statistics of the model.
        image_shape: the shape [h, w, c] of one image.
        notes: additional metadata for the file (`metadata_props`).
        image_dtype: the dtype of the images. uint8 images are divided by 255; floats are unchanged.

    Raises:
        UserError: if the network uses an unsupported operation.
    """

    def logits(images: Any) -> Any:
        return forward(params, batch_stats, {"image": images}, model=model, train=False)[0]

    (batch,) = export.symbolic_shape("batch")
    program = traced(logits, jax.ShapeDtypeStruct((batch, *image_shape), image_dtype))
    graph = Graph()
    (result,) = evaluate(program, [IMAGES], graph.write)
    graph.nodes.append(helper.make_node("Identity", [graph.name(result)], [LOGITS]))
    sides = [
        helper.make_tensor_value_info(name, _dtype(variable), ["batch", *variable.aval.shape[1:]])
        for name, variable in (
            (IMAGES, program.jaxpr.invars[0]),
            (LOGITS, program.jaxpr.outvars[0]),
        )
    ]
    proto = helper.make_model(
        helper.make_graph(graph.nodes, type(model).__name__, sides[:1], sides[1:], graph.arrays),
        producer_name="bnjax",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(proto, {"bnjax": json.dumps(dict(notes))} if notes else {})
    onnx.checker.check_model(proto, full_check=True)
    return proto


class Graph:
    """The constants of an ONNX graph, and its nodes in the order of computation."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.arrays: list[TensorProto] = []
        self._names: dict[Any, str] = {}  # maps the content of a constant to its name
        self._count: Counter[str] = Counter()

    def add(self, op: str, *inputs: Value, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        self._count[op] += 1
        name = f"{op.lower()}_{self._count[op]}"
        given = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(op, given, [name], name=name, **attributes))
        return name

    def name(self, value: Value) -> str:
        """Returns the name of a value; an array becomes a constant of the graph."""
        if isinstance(value, str):
            return value
        content = (value.dtype, value.shape, value.tobytes())
        if content not in self._names:
            self._names[content] = f"constant_{len(self._names)}"
            self.arrays.append(numpy_helper.from_array(value, self._names[content]))
        return self._names[content]

    def write(self, equation: Any, *inputs: Any) -> list[Value]:
        """Adds an operation; returns its results, as arrays if constant and as names otherwise."""
        primitive, params = equation.primitive, equation.params
        known = [value if isinstance(value, str) else np.asarray(value) for value in inputs]
        is_constant = not any(isinstance(value, str) for value in known)
        if is_constant and not any(map(_is_symbolic, jax.tree.leaves(params))):
            found = primitive.bind(*inputs, **params)
            return [*map(np.asarray, found if primitive.multiple_results else [found])]
        try:
            _check(primitive.name in RULES, "")
            results = RULES[primitive.name](self, equation, *known)
        except NotImplementedError as error:
            what = f"{primitive.name} {error}".strip()
            raise UserError(
                f"the network uses the operation {what}, which bnjax cannot write as ONNX "
                "(bnjax/export/onnx.py lists the supported operations). Export without --onnx, "
                "because the StableHLO program supports every operation."
            ) from error
        return results if isinstance(results, list) else [results]


# (graph, equation, *inputs) -> an output, or a list of outputs.
Rule = Callable[..., Value | list[Value]]


def _check(fits: bool, otherwise: str) -> None:
    if not fits:
        raise NotImplementedError(otherwise)


def _is_symbolic(size: Any) -> bool:
    """Returns whether a size depends on the number of images."""
    return export.is_symbolic_dim(size)


def _integers(values: Iterable[Any]) -> np.ndarray:
    """Returns axes or sizes as ONNX expects them, int64 [n], with -1 for a symbolic size."""
    return np.array([-1 if _is_symbolic(one) else int(one) for one in values], np.int64)


def _dtype(variable: Any) -> int:
    _check(variable.aval.dtype != jnp.bfloat16, "to bfloat16")
    return helper.np_dtype_to_tensor_dtype(np.dtype(variable.aval.dtype))


def _number(equation: Any, number: Any) -> np.ndarray:
    return np.asarray(number, equation.outvars[0].aval.dtype)


def _transposed(graph: Graph, x: Value, order: Sequence[int]) -> Value:
    order = [*map(int, order)]
    if order == sorted(order):
        return x
    if isinstance(x, np.ndarray):
        return x.transpose(order)
    return graph.add("Transpose", x, perm=order)


def _inverse(order: Sequence[int]) -> list[int]:
    return [*map(int, np.argsort(order))]


def _reshaped(graph: Graph, x: Value, shape: Sequence[Any]) -> Value:
    if isinstance(x, np.ndarray):
        return x.reshape(shape)
    _check(
        sum(map(_is_symbolic, shape)) <= 1,
        f"to {tuple(shape)}, where two sizes depend on the batch",
    )
    return graph.add("Reshape", x, _integers(shape))


def _reshape(graph: Graph, equation: Any, x: Value) -> Value:
    _check(equation.params.get("dimensions") is None, "in another order")
    return _reshaped(graph, x, equation.outvars[0].aval.shape)


def _batch(graph: Graph, size: Any) -> str:
    """Adds nodes that compute the number of images, int64 [1]; returns the name of the output."""
    _check(str(size) == "batch", f"of {size}")
    return graph.add("Shape", IMAGES, start=0, end=1)


def _broadcast(graph: Graph, equation: Any, x: Value, *_: Value) -> Value:
    shape, old = equation.params["shape"], equation.invars[0].aval.shape
    middle: list[Any] = [1] * len(shape)
    for place, size in zip(equation.params["broadcast_dimensions"], old, strict=True):
        middle[place] = size
    x = x if tuple(middle) == tuple(old) else _reshaped(graph, x, middle)
    # Expand does not change axes whose target size is 1.
    wanted = [1 if mine == its else its for mine, its in zip(middle, shape, strict=True)]
    if all(size == 1 for size in wanted):
        return x
    if not any(map(_is_symbolic, wanted)):
        return graph.add("Expand", x, _integers(wanted))
    sizes = [_batch(graph, one) if _is_symbolic(one) else _integers([one]) for one in wanted]
    return graph.add("Expand", x, graph.add("Concat", *sizes, axis=0))


def _convolution(graph: Graph, equation: Any, x: Value, kernel: Value) -> Value:
    params, orders = equation.params, equation.params["dimension_numbers"]
    padding = [tuple(map(int, sides)) for sides in params["padding"]]
    _check({*params["lhs_dilation"]} <= {1}, "with a dilated input (a transposed convolution)")
    _check(params["batch_group_count"] == 1, "with groups along the batch axis")
    _check(min(map(min, padding), default=0) >= 0, "with negative padding")
    out = graph.add(
        "Conv",
        _transposed(graph, x, orders.lhs_spec),
        _transposed(graph, kernel, orders.rhs_spec),
        kernel_shape=[equation.invars[1].aval.shape[axis] for axis in orders.rhs_spec[2:]],
        strides=[*params["window_strides"]],
        dilations=[*params["rhs_dilation"]],
        pads=[side[0] for side in padding] + [side[1] for side in padding],
        group=params["feature_group_count"],
    )
    return _transposed(graph, out, _inverse(orders.out_spec))


def _product(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
    (of_x, of_y), (batch_x, batch_y) = equation.params["dimension_numbers"]
    ranks = [len(variable.aval.shape) for variable in equation.invars]
    wanted = equation.outvars[0].aval.dtype
    _check(equation.invars[0].aval.dtype == wanted, f"whose result is {wanted}")
    if not batch_x and ranks[1] == 2 and (*of_x, *of_y) == (ranks[0] - 1, 0):
        return graph.add("MatMul", x, y)
    left = [*string.ascii_lowercase[: ranks[0]]]
    right = [*string.ascii_uppercase[: ranks[1]]]
    for mine, its in zip((*of_x, *batch_x), (*of_y, *batch_y), strict=True):
        right[its] = left[mine]
    out = [left[axis] for axis in batch_x]
    out += [one for axis, one in enumerate(left) if axis not in (*of_x, *batch_x)]
    out += [one for axis, one in enumerate(right) if axis not in (*of_y, *batch_y)]
    return graph.add("Einsum", x, y, equation=f"{''.join(left)},{''.join(right)}->{''.join(out)}")


def _pooling(op: str, **options: int) -> Rule:
    def write(graph: Graph, equation: Any, x: Value) -> Value:
        params = equation.params
        window, steps, padding = (
            params[key] for key in ("window_dimensions", "window_strides", "padding")
        )
        dilations = {*params["base_dilation"], *params["window_dilation"]}
        _check(dilations <= {1}, "with a dilated input or window")
        about = [*zip(window, steps, padding, strict=True)]
        still = [axis for axis, one in enumerate(about) if one == (1, 1, (0, 0))]
        # ONNX pools all axes except the first two.
        _check(len(still) >= 2 and len(about) >= 3, "over more axes than ONNX pools")
        pooled = [axis for axis in range(len(about)) if axis not in (still[0], still[-1])]
        order = [still[0], still[-1], *pooled]
        out: Value = graph.add(
            op,
            _transposed(graph, x, order),
            kernel_shape=[window[axis] for axis in pooled],
            strides=[steps[axis] for axis in pooled],
            pads=[padding[axis][side] for side in (0, 1) for axis in pooled],
            **options,
        )
        if op == "AveragePool":  # this mean includes padded zeros
            out = graph.add("Mul", out, _number(equation, math.prod(window)))
        return _transposed(graph, out, _inverse(order))

    return write


def _slice(graph: Graph, equation: Any, x: Value) -> Value:
    params, shape = equation.params, equation.invars[0].aval.shape
    steps = params["strides"] or [1] * len(shape)
    cuts = [*zip(params["start_indices"], params["limit_indices"], steps, strict=True)]
    axes = [axis for axis, size in enumerate(shape) if cuts[axis] != (0, size, 1)]
    _check(not any(_is_symbolic(shape[axis]) for axis in axes), "along the batch")
    starts, ends, steps = ([cuts[axis][i] for axis in axes] for i in range(3))
    return graph.add("Slice", x, *map(_integers, (starts, ends, axes, steps)))


def _reverse(graph: Graph, equation: Any, x: Value) -> Value:
    """Reverses axes with slices of step -1."""
    axes = equation.params["dimensions"]
    back, end = [-1] * len(axes), [np.iinfo(np.int64).min] * len(axes)
    return graph.add("Slice", x, *map(_integers, (back, end, axes, back)))


def _split(graph: Graph, equation: Any, x: Value) -> list[Value]:
    axis, ends = [equation.params["axis"]], np.cumsum(equation.params["sizes"])
    parts = zip([0, *ends[:-1]], ends, strict=True)
    return [graph.add("Slice", x, *map(_integers, ([start], [end], axis))) for start, end in parts]


def _pad(graph: Graph, equation: Any, x: Value, filling: Value) -> Value:
    config = equation.params["padding_config"]
    fits = all(low >= 0 and high >= 0 and inner == 0 for low, high, inner in config)
    _check(fits, "between the values or with negative padding")
    return graph.add("Pad", x, _integers(one[side] for side in (0, 1) for one in config), filling)


def _gather(graph: Graph, equation: Any, x: Value, places: Value) -> Value:
    """Gathers the same positions from each image by their flat indices."""
    shape, sizes = equation.invars[0].aval.shape, equation.params["slice_sizes"]
    _check(isinstance(places, np.ndarray), "with computed indices")
    of, to = (
        [axis for axis, size in enumerate(one) if _is_symbolic(size)]
        for one in (sizes, equation.outvars[0].aval.shape)
    )
    _check(len(of) == len(to) == 1, "along the batch")
    one_image = [1 if _is_symbolic(size) else size for size in shape]
    numbers = np.arange(math.prod(one_image), dtype=np.int32).reshape(one_image)
    params = equation.params | {"slice_sizes": tuple(1 if _is_symbolic(n) else n for n in sizes)}
    params["fill_value"] = -1
    found = np.asarray(equation.primitive.bind(numbers, places, **params))
    _check(bool((found >= 0).all()), "outside of the array")
    order = [*of, *(axis for axis in range(len(shape)) if axis not in of)]
    flat = graph.add("Reshape", _transposed(graph, x, order), _integers([-1, numbers.size]))
    out = graph.add("Gather", flat, found.reshape(-1), axis=1)
    order = [*to, *(axis for axis in range(found.ndim) if axis not in to)]
    out = graph.add("Reshape", out, _integers([-1, *np.delete(found.shape, to)]))
    return _transposed(graph, out, _inverse(order))


def _select(graph: Graph, equation: Any, which: Value, *cases: Value) -> Value:
    _check(equation.invars[0].aval.dtype == bool and len(cases) == 2, "among more than two cases")
    return graph.add("Where", which, cases[1], cases[0])


def _maximum(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
    for one, other in ((x, y), (y, x)):
        if isinstance(other, np.ndarray) and not other.any():  # runtimes fuse Relu
            return graph.add("Relu", one)
    return graph.add("Max", x, y)


def _plain(op: str) -> Rule:
    return lambda graph, equation, *inputs: graph.add(op, *inputs)


def _reduction(op: str) -> Rule:
    return lambda graph, equation, x: graph.add(
        op, x, _integers(equation.params["axes"]), keepdims=0
    )


def _same(graph: Graph, equation: Any, *inputs: Value) -> list[Value]:
    return [*inputs]


# Primitives whose ONNX operator has the same name, except for capital letters.
SAME_NAME = (
    "abs add and ceil cos div erf exp floor log min mul neg not or pow sign sin sqrt sub tanh xor"
)
OTHER_NAMES = {
    "add_any": "Add",
    "logistic": "Sigmoid",
    "eq": "Equal",
    "gt": "Greater",
    "lt": "Less",
    "ge": "GreaterOrEqual",
    "le": "LessOrEqual",
}
RULES: dict[str, Rule] = {
    **{name: _plain(name.capitalize()) for name in SAME_NAME.split()},
    **{name: _plain(op) for name, op in OTHER_NAMES.items()},
    **dict.fromkeys(("copy", "copy_p", "name", "optimization_barrier", "stop_gradient"), _same),
    "ne": lambda g, eqn, x, y: g.add("Not", g.add("Equal", x, y)),
    "rsqrt": lambda g, eqn, x: g.add("Reciprocal", g.add("Sqrt", x)),
    "square": lambda g, eqn, x: g.add("Mul", x, x),
    "integer_pow": lambda g, eqn, x: g.add("Pow", x, _number(eqn, eqn.params["y"])),
    "erfc": lambda g, eqn, x: g.add("Sub", _number(eqn, 1), g.add("Erf", x)),
    "expm1": lambda g, eqn, x: g.add("Sub", g.add("Exp", x), _number(eqn, 1)),
    "log1p": lambda g, eqn, x: g.add("Log", g.add("Add", x, _number(eqn, 1))),
    "clamp": lambda g, eqn, low, x, high: g.add("Min", g.add("Max", x, low), high),
    "max": _maximum,
    "select_n": _select,
    "convert_element_type": lambda g, eqn, x: g.add("Cast", x, to=_dtype(eqn.outvars[0])),
    "dim_as_value": lambda g, eqn: g.add(
        "Cast", g.add("Squeeze", _batch(g, eqn.params["dim"])), to=_dtype(eqn.outvars[0])
    ),
    "reshape": _reshape,
    "squeeze": lambda g, eqn, x: _reshaped(g, x, eqn.outvars[0].aval.shape),
    "transpose": lambda g, eqn, x: _transposed(g, x, eqn.params["permutation"]),
    "broadcast_in_dim": _broadcast,
    "concatenate": lambda g, eqn, *parts: g.add("Concat", *parts, axis=eqn.params["dimension"]),
    "slice": _slice,
    "rev": _reverse,
    "split": _split,
    "pad": _pad,
    "gather": _gather,
    "conv_general_dilated": _convolution,
    "dot_general": _product,
    "reduce_window_max": _pooling("MaxPool"),
    "reduce_window_sum": _pooling("AveragePool", count_include_pad=1),
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "reduce_prod": _reduction("ReduceProd"),
}
