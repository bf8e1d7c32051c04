"""A network as ONNX, translated from its traced program."""

import itertools
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
from jax.extend import core
from onnx import NodeProto, TensorProto, helper, numpy_helper

from bnjax.errors import UserError
from bnjax.train_step import forward
from bnjax.types import BatchStats, Params

# A value of the program: known now, or the name of what computes it later.
Value = np.ndarray | str


class Graph:
    """Nodes in the order of their computation, and the arrays that they read."""

    def __init__(self, images: str):
        """Begins a graph that is given `images`, whose first axis is the batch."""
        self._images = images
        self._batch: str | None = None
        self.nodes: list[NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}
        self._names: dict[int, tuple[str, Any]] = {}  # with the array, so that its id stays its own
        self._count: Counter[str] = Counter()

    def add(self, op: str, *inputs: Value, **attributes: Any) -> str:
        """Adds a node, and returns the name of its output."""
        return self.add_many(op, 1, *inputs, **attributes)[0]

    def add_many(self, op: str, outputs: int, *inputs: Value, **attributes: Any) -> list[str]:
        """Adds a node with several outputs, and returns their names."""
        name = self._fresh(op.lower())
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        given = [self.name(value) for value in inputs]
        self.nodes.append(helper.make_node(op, given, names, name=name, **attributes))
        return names

    def name(self, value: Value) -> str:
        """Returns the name of a value; an array becomes a constant of the graph."""
        if isinstance(value, str):
            return value
        if id(value) not in self._names:
            name = self._fresh("constant")
            self._names[id(value)] = name, value
            self.arrays[name] = value
        return self._names[id(value)][0]

    def batch(self) -> str:
        """Returns the name of the number of images, int64 [1]."""
        if self._batch is None:
            self._batch = self.add("Shape", self._images, start=0, end=1)
        return self._batch

    def _fresh(self, stem: str) -> str:
        self._count[stem] += 1
        return f"{stem}_{self._count[stem]}"

    def put_biases_into_convolutions(self) -> None:
        """Makes what is added to each channel of a convolution's output its bias.

        Runtimes do it too, but not across the transposition between the two.
        """
        readers = Counter(name for node in self.nodes for name in node.input)
        makers = {name: node for node in self.nodes for name in node.output}
        kept: list[NodeProto] = []
        renamed: dict[str, str] = {}
        for node in self.nodes:
            node.input[:] = [renamed.get(name, name) for name in node.input]
            found = self._convolution_below(node, makers, readers)
            if found is None:
                kept.append(node)
                continue
            convolution, transposed, bias = found
            convolution.input.append(self.name(bias))
            renamed[node.output[0]] = transposed
        self.nodes = kept

    def _convolution_below(
        self, node: NodeProto, makers: dict[str, NodeProto], readers: Counter[str]
    ) -> tuple[NodeProto, str, np.ndarray] | None:
        """Returns the convolution whose bias a node adds, its transposed output, and the bias."""
        if node.op_type != "Add":
            return None
        for given, other in (tuple(node.input), tuple(reversed(node.input))):
            bias, transpose = self.arrays.get(other), makers.get(given)
            if bias is None or transpose is None or transpose.op_type != "Transpose":
                continue
            convolution = makers.get(transpose.input[0])
            if convolution is None or convolution.op_type != "Conv" or len(convolution.input) > 2:
                continue
            if readers[given] > 1 or readers[convolution.output[0]] > 1:
                continue
            kernel = self.arrays.get(convolution.input[1])
            (order,) = (helper.get_attribute_value(one) for one in transpose.attribute)
            # The channels, axis 1 of the convolution, have to be the only axis of the bias.
            shape = [1] * len(order)
            if kernel is not None:
                shape[list(order).index(1)] = len(kernel)
                if bias.shape == tuple(shape):
                    return convolution, given, bias.reshape(-1)
        return None

    def finish(self, result: Value, name: str) -> None:
        """Gives the result its name."""
        self.nodes.append(helper.make_node("Identity", [self.name(result)], [name], name=name))

    def tensors(self) -> list[TensorProto]:
        """Returns the arrays that nodes read, as ONNX has them."""
        read = {name for node in self.nodes for name in node.input}
        return [
            numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
            for name, array in self.arrays.items()
            if name in read
        ]


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


def _one(operation: Any, number: float | int = 1) -> np.ndarray:
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


# Any onnxruntime since 1.14 (2023) runs these.
OPSET = 18
IR_VERSION = 8
IMAGES, LOGITS = "images", "logits"
# Operations that only call the program in their parameters.
_CALLS = {
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}


def onnx_model(
    model: nn.Module,
    params: Params,
    batch_stats: BatchStats,
    image_shape: tuple[int, int, int],
    notes: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """Returns the network in evaluation: `images` uint8 [batch, h, w, c] to `logits` float32.

    Args:
        model: any linen module with `__call__(x, train=...)`, whose arithmetic is in float32.
        params: its weights.
        batch_stats: its running statistics.
        image_shape: of one image, [h, w, c].
        notes: what else the file is to say (`metadata_props`).

    Raises:
        UserError: if the network uses an operation that is not known here; it is named.
    """

    def logits(images: Any) -> Any:
        return forward(params, batch_stats, {"image": images}, model=model, train=False)[0]

    (batch,) = export.symbolic_shape("batch")
    like = jax.ShapeDtypeStruct((batch, *image_shape), np.uint8)
    closed = jax.make_jaxpr(logits)(like)
    graph = Graph(IMAGES)
    (result,) = _follow(graph, closed.jaxpr, closed.consts, [IMAGES])
    graph.put_biases_into_convolutions()
    graph.finish(result, LOGITS)
    (out,) = closed.out_avals
    made = helper.make_graph(
        graph.nodes,
        type(model).__name__,
        [helper.make_tensor_value_info(IMAGES, TensorProto.UINT8, ["batch", *image_shape])],
        [helper.make_tensor_value_info(LOGITS, _onnx_dtype(out.dtype), ["batch", out.shape[1]])],
        graph.tensors(),
    )
    proto = helper.make_model(
        made,
        producer_name="bnjax",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(proto, {"bnjax": json.dumps(dict(notes or {}))} if notes else {})
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _onnx_dtype(dtype: Any) -> int:
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def _follow(
    graph: Graph, jaxpr: Any, constants: Sequence[Any], given: Sequence[Value]
) -> list[Value]:
    """Adds what a program does to the graph; returns its results."""
    values: dict[Any, Value] = dict(zip(jaxpr.invars, given, strict=True))
    values |= zip(jaxpr.constvars, map(np.asarray, constants), strict=True)

    def read(variable: Any) -> Value:
        if isinstance(variable, core.Literal):
            aval: Any = variable.aval
            return np.asarray(variable.val, aval.dtype)
        return values[variable]

    for operation in _needed(jaxpr):
        inputs = [*map(read, operation.invars)]
        name = operation.primitive.name
        results: Sequence[Value]
        if name in _CALLS:
            results = _follow(graph, *_program_in(operation.params), inputs)
        elif _is_known(operation, inputs):
            results = _compute(operation, inputs)
        elif name in PRIMITIVES:
            try:
                results = PRIMITIVES[name](graph, operation, *inputs)
            except UnknownError as error:
                raise _unknown(f"{name} {error}") from error
        else:
            raise _unknown(name)
        values |= zip(operation.outvars, results, strict=True)
    return [*map(read, jaxpr.outvars)]


def _needed(jaxpr: Any) -> list[Any]:
    """Returns the operations that the results of a program depend on, in their order."""
    values, found = {*filter(_is_variable, jaxpr.outvars)}, []
    for operation in reversed(jaxpr.eqns):
        if not values.isdisjoint(operation.outvars):
            values.update(filter(_is_variable, operation.invars))
            found.append(operation)
    return found[::-1]


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, core.Literal)


def _program_in(params: Mapping[str, Any]) -> tuple[Any, Sequence[Any]]:
    """Returns the program that an operation calls, and its constants."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inner = next(params[name] for name in names if name in params)
    return (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())


def _is_known(operation: Any, inputs: Sequence[Value]) -> bool:
    """Returns whether an operation depends on no image, nor on how many there are."""
    sizes = [size for out in operation.outvars for size in out.aval.shape]
    sizes += [operation.params["dim"]] if operation.primitive.name == "dim_as_value" else []
    return all(isinstance(value, np.ndarray) for value in inputs) and not any(
        map(export.is_symbolic_dim, sizes)
    )


def _compute(operation: Any, inputs: Sequence[Value]) -> list[Value]:
    results = operation.primitive.bind(*inputs, **operation.params)
    return [*map(np.asarray, results if operation.primitive.multiple_results else [results])]


def _unknown(what: str) -> UserError:
    return UserError(
        f"the network uses the operation {what}, which bnjax does not write as ONNX "
        "(bnjax/export/onnx_primitives.py has those that it does). Export without --onnx: the "
        "StableHLO program takes every operation."
    )
