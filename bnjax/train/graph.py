"""A linen module as a graph: what is computed from what, layer by layer."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.extend import core
from tensorboardX.proto.attr_value_pb2 import AttrValue
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.node_def_pb2 import NodeDef
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboardX.proto.versions_pb2 import VersionDef

from bnjax.train_step import forward, init_variables

IMAGES = "images"
# Each call of a module marks what is computed in it with its number.
MARK = re.compile("@([0-9]+)@")


@dataclasses.dataclass
class Node:
    """One layer, or one operation between layers.

    Attributes:
        name: its path in the module tree, "/" between the parts.
        op: the class of the layer, or the name of the operation.
        inputs: the names of the nodes that it computes from, in the order in which they were
            computed.
        shape: of its output.
        parameters: names and shapes of the arrays that it holds.
    """

    name: str
    op: str
    inputs: list[str] = dataclasses.field(default_factory=list)
    shape: tuple[int, ...] = ()
    parameters: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def nodes(model: nn.Module, shape: Sequence[int], dtype: Any = np.uint8) -> list[Node]:
    """Returns the graph of a training step's forward pass, in the order of the computation.

    Nothing is computed.

    Modules that call no others are one node each; what is computed between them is a node for each
    operation. What does not depend on the images, or what the result does not depend on, is left
    out.

    Args:
        model: any linen module, as for `bnjax.train_step.train_step`.
        shape: of a batch of images, (n, h, w, c).
        dtype: of the images.
    """
    key = jax.random.key(0)
    images = jax.ShapeDtypeStruct(tuple(shape), dtype)
    params, batch_stats = jax.eval_shape(lambda image: init_variables(model, key, image), images)
    calls: list[_Call] = []

    def logits(variables: Any, image: Any) -> Any:
        with nn.intercept_methods(_marking(calls, [])):
            return forward(
                variables["params"],
                variables["batch_stats"],
                {"image": image},
                model=model,
                train=True,
                dropout=key,
            )[0]

    jaxpr = jax.make_jaxpr(logits)({"params": params, "batch_stats": batch_stats}, images).jaxpr
    flow = _Flow(calls, {"params": params, "batch_stats": batch_stats})
    source = flow.add(Node(IMAGES, "Placeholder", shape=images.shape))
    results = flow.follow(jaxpr, [*[None] * (len(jaxpr.invars) - 1), source], owner=None)
    for variable, node in zip(jaxpr.outvars, results, strict=True):
        if node:
            node.shape = _shape(variable)
    return _needed(flow.nodes, [node.name for node in results if node])


def graph_def(nodes: list[Node]) -> GraphDef:
    """Returns the graph as TensorBoard wants it."""
    return GraphDef(node=[_node_def(node) for node in nodes], versions=VersionDef(producer=22))


def _node_def(node: Node) -> NodeDef:
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in node.shape])
    attributes = {"_output_shapes": AttrValue(list=AttrValue.ListValue(shape=[shape]))}
    for name, sizes in node.parameters.items():
        attributes[name] = AttrValue(s="x".join(map(str, sizes)).encode())
    return NodeDef(name=node.name, op=node.op, input=node.inputs, attr=attributes)


@dataclasses.dataclass
class _Call:
    path: tuple[str, ...]
    op: str
    innermost: bool = True


def _marking(calls: list[_Call], open_calls: list[_Call]) -> Any:
    """Returns an interceptor that lists the calls of modules and marks what is computed in each."""

    def intercept(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if open_calls:
            open_calls[-1].innermost = False
        calls.append(_Call(context.module.path, type(context.module).__name__))
        open_calls.append(calls[-1])
        with jax.named_scope(f"@{len(calls) - 1}@"):
            result = call(*args, **kwargs)
        open_calls.pop()
        return result

    return intercept


class _Flow:
    """Follows the images through a jaxpr; `nodes` are those met so far."""

    def __init__(self, calls: list[_Call], variables: dict[str, Any]):
        self.nodes: list[Node] = []
        self._calls, self._variables = calls, variables
        self._of_call: dict[int, Node] = {}
        self._names: set[str] = set()

    def add(self, node: Node) -> Node:
        """Adds a node, under another name if its own is taken."""
        name, count = node.name, 0
        while node.name in self._names:
            count += 1
            node.name = f"{name}_{count}"
        self._names.add(node.name)
        self.nodes.append(node)
        return node

    def follow(
        self, jaxpr: core.Jaxpr, inputs: Sequence[Node | None], owner: int | None
    ) -> list[Node | None]:
        """Returns the node of each output, None for those that do not depend on the images."""
        found: dict[Any, Node | None] = dict(zip(jaxpr.invars, inputs, strict=True))

        def origin(variable: Any) -> Node | None:
            return None if isinstance(variable, core.Literal) else found.get(variable)

        for equation in jaxpr.eqns:
            origins = [origin(variable) for variable in equation.invars]
            if not any(origins):
                continue
            marks = MARK.findall(str(equation.source_info.name_stack))
            mine = int(marks[-1]) if marks else owner
            inner = _inner(equation)
            if inner is not None and MARK.search(_stacks(inner)):
                results = self.follow(inner, origins, mine)
            else:
                node = self._node(equation, mine)
                for variable, other in zip(equation.invars, origins, strict=True):
                    if other and other is not node:
                        other.shape = _shape(
                            variable
                        )  # of what leaves a layer, whatever it computes besides
                        node.inputs += [other.name] if other.name not in node.inputs else []
                results = [node] * len(equation.outvars)
            found.update(zip(equation.outvars, results, strict=True))
        return [origin(variable) for variable in jaxpr.outvars]

    def _node(self, equation: Any, number: int | None) -> Node:
        """Returns the node of an equation: that of its layer, else one of its own."""
        call = self._calls[number] if number is not None else _Call((), "", innermost=False)
        if number is None or not call.innermost:
            node = self.add(
                Node("/".join([*call.path, _operation(equation)]), _operation(equation))
            )
        elif number in self._of_call:
            node = self._of_call[number]
        else:
            node = self.add(
                Node(
                    "/".join(call.path) or call.op,
                    call.op,
                    parameters=_held(self._variables, call.path),
                )
            )
            self._of_call[number] = node
        node.shape = _shape(equation.outvars[0])
        return node


def _shape(variable: Any) -> tuple[int, ...]:
    return tuple(variable.aval.shape)


def _held(variables: dict[str, Any], path: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Returns names and shapes of the parameters and the statistics of a layer."""
    held: dict[str, tuple[int, ...]] = {}
    for tree in variables.values():
        for part in path:
            tree = tree.get(part, {})
        held |= {name: leaf.shape for name, leaf in tree.items() if hasattr(leaf, "shape")}
    return held


def _operation(equation: Any) -> str:
    inner = _inner(equation)
    if "name" in equation.params:
        return str(equation.params["name"])
    if inner is not None and len(inner.eqns) == 1:  # as in custom_jvp_call, which has no name
        return _operation(inner.eqns[0])
    return str(equation.primitive.name)


def _inner(equation: Any) -> Any:
    """Returns the jaxpr that an equation calls with its own inputs, or None."""
    for value in equation.params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if isinstance(jaxpr, core.Jaxpr) and len(jaxpr.invars) == len(equation.invars):
            return jaxpr
    return None


def _stacks(jaxpr: Any) -> str:
    """Returns the name stacks of all equations, those of inner jaxprs included."""
    inner = (_inner(equation) for equation in jaxpr.eqns)
    own = (str(equation.source_info.name_stack) for equation in jaxpr.eqns)
    return " ".join([*own, *(_stacks(jaxpr) for jaxpr in inner if jaxpr is not None)])


def _needed(nodes: list[Node], results: list[str]) -> list[Node]:
    """Returns the nodes that the results depend on."""
    wanted = set(results)
    for node in reversed(nodes):
        if node.name in wanted:
            wanted |= set(node.inputs)
    return [node for node in nodes if node.name in wanted]
