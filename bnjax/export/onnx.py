"""A network's evaluation as an ONNX model, with the `onnx` package alone.

The program is what JAX traces (its jaxpr), so that nothing has to be known of the model: each
primitive becomes the ONNX operators that do the same (`onnx_primitives`). What depends on no image,
as the reciprocal of a standard deviation, is computed here and becomes a constant. Axes stay in the
order that they have in JAX, [n, h, w, c], with transpositions around convolutions and pooling,
which runtimes cancel; so what is flattened has the order that the dense layers know.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import onnx
from jax import export
from jax.extend import core
from onnx import TensorProto, helper

from bnjax.errors import UserError
from bnjax.export.onnx_graph import Graph, Value
from bnjax.export.onnx_layers import UnknownError
from bnjax.export.onnx_primitives import PRIMITIVES
from bnjax.train_step import forward
from bnjax.types import BatchStats, Params

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
    notes: Mapping[str, str] | None = None,
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
