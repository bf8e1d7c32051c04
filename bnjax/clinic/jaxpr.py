"""Evaluates the equations of traced programs, and builds the graph of a network's layers."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core
from jax.interpreters.partial_eval import dce_jaxpr

from bnjax.clinic.network import STORED, Call, Network, Path

# (equation, *values of its operands) -> values of its results. Values may have any type.
Rule = Callable[..., Sequence[Any]]
# The primitives that only call another program.
CALLS = {
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


def traced(function: Callable[..., Any], *arguments: Any) -> Any:
    """Returns the closed jaxpr of a function, without dead code."""
    program = jax.make_jaxpr(function)(*arguments)
    jaxpr, _ = dce_jaxpr(program.jaxpr, [True] * len(program.jaxpr.outvars), instantiate=True)
    return core.ClosedJaxpr(jaxpr, program.consts)


def evaluate(
    program: Any, inputs: Sequence[Any], rule: Rule, inlined: Callable[[Any], bool] = lambda _: True
) -> list[Any]:
    """Evaluates a program on values of any type, using a rule for its equations.

    Args:
        program: a closed jaxpr from `traced`.
        inputs: the value of each input. Constants and literals are arrays.
        rule: a function that computes the results of an equation.
        inlined: a function that returns whether to inline a called program; otherwise the rule
            evaluates the call.
    """
    jaxpr = program.jaxpr
    values = dict(zip(jaxpr.constvars, program.consts, strict=True))
    values |= zip(jaxpr.invars, inputs, strict=True)

    def read(atom: Any) -> Any:
        is_literal = isinstance(atom, core.Literal)
        return np.asarray(atom.val, atom.aval.dtype) if is_literal else values[atom]

    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        called = programs(equation) if equation.primitive.name in CALLS else []
        if called and inlined(called[0]):
            results: Sequence[Any] = evaluate(called[0], operands, rule, inlined)
        else:
            results = rule(equation, *operands)
        values |= zip(equation.outvars, results, strict=True)
    return [read(atom) for atom in jaxpr.outvars]


def programs(equation: Any) -> list[Any]:
    """Returns the programs that an equation calls (bodies of loops, branches) as closed jaxprs."""
    found = []
    for value in equation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, core.ClosedJaxpr):  # since JAX 0.12 the same class as Jaxpr
                found.append(inner)
            elif isinstance(inner, core.Jaxpr):
                found.append(core.ClosedJaxpr(inner, ()))
    return found


@dataclasses.dataclass(eq=False)
class Node:
    """A call of a module, or an operation outside of all such calls.

    Attributes:
        path: the path of the module; for an operation, the path of its module followed by the
            operation's name.
        kind: the name of the module's class, or of the operation.
        call: the call of the module; None for an operation.
        returned: the shape of the output inside the module.
        shape: the shape of the output in the program; `nn.vmap` adds an axis.
        equation: the equation of an operation; None for a call.
        inputs: the nodes that compute the inputs, without duplicates.
        readers: the nodes that read the output, without duplicates.
        has_computed: whether the call uses parameters computed from stored parameters.
    """

    path: Path
    kind: str
    call: Any = None
    returned: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    equation: Any = None
    inputs: list["Node"] = dataclasses.field(default_factory=list)
    readers: list["Node"] = dataclasses.field(default_factory=list)
    has_computed: bool = False

    def read(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
        """Adds to the inputs all values that are nodes."""
        for variable, value in zip(variables, values, strict=True):
            if isinstance(value, Node) and value is not self:
                value.shape = tuple(variable.aval.shape)
                if value not in self.inputs:
                    self.inputs.append(value)
                    value.readers.append(self)


class _Parameter(NamedTuple):
    """A stored parameter, or a value computed from stored parameters.

    Attributes:
        computed_in: the index of the call that computes the value; None for a stored parameter.
    """

    computed_in: int | None


# Matches the name scope of a call: "@3@" for call 3.
_MARK = re.compile("@([0-9]+)@")


def layers(
    network: Network,
    batch: Mapping[str, Any],
    *,
    train: bool,
    dropout: Any = None,
    chosen: Callable[[Call], bool] = lambda call: True,
) -> list[Node]:
    """Traces a network and returns its graph as a list of nodes in the order of computation.

    The first node represents the images, and the last the logits. Operations that do not depend on
    the images or do not affect the logits are omitted. A loop or branch that calls modules becomes
    one node before and one node after the nodes of its body.

    Args:
        network: a network; its variables may be given as shapes.
        batch: `image` [n, h, w, c], or its shape.
        train: whether to trace training instead of evaluation.
        dropout: the dropout key.
        chosen: a function that returns whether the call of a module without submodules becomes a
            node.
    """
    calls: list[Node] = []
    split: set[int] = set()  # calls that are not nodes
    open_calls: list[int] = []

    def around(call: Call) -> Any:
        number = len(calls)
        split.update(open_calls[-1:])
        if not chosen(call):
            split.add(number)
        calls.append(Node(call.path, call.kind.__name__, call))
        open_calls.append(number)
        with jax.named_scope(f"@{number}@"):
            result = call()
        open_calls.pop()
        calls[number].returned = getattr(result, "shape", ())
        return result

    def logits(network: Network, images: Any) -> Any:
        options = {"train": train, "dropout": dropout, "around": around}
        return network.run({"image": images}, **options)[0]

    program = traced(logits, network, batch["image"])
    images = Node(("images",), "Placeholder", shape=batch["image"].shape)
    found = {images: None}  # an ordered set

    def rule(equation: Any, *values: Any) -> list[Any]:
        scope = str(equation.source_info.name_stack)
        if STORED in scope:
            return [_Parameter(None)] * len(equation.outvars)
        marks = _MARK.findall(scope)
        number = int(marks[-1]) if marks else -1
        parameters = [value for value in values if isinstance(value, _Parameter)]
        if marks and any(one.computed_in not in (None, number) for one in parameters):
            calls[number].has_computed = True
        if not any(isinstance(value, Node) for value in values):
            return [_Parameter(number) if parameters else None] * len(equation.outvars)
        if marks and number not in split:
            node = calls[number]
        else:
            path, name = calls[number].path if marks else (), name_of(equation)
            node = Node((*path, name), name, equation=equation)
        found[node] = None
        node.read(equation.invars, values)
        bodies = [inner for inner in programs(equation) if _has_marks(inner)]
        if bodies:
            given = [node if isinstance(value, Node) else value for value in values]
            node = Node(node.path, node.kind, equation=equation)
            for body in bodies:
                own = given[len(given) - len(body.jaxpr.invars) :]
                node.read(body.jaxpr.outvars, evaluate(body, own, rule, _has_marks))
            found[node] = None
        node.shape = tuple(equation.outvars[0].aval.shape)
        return [node] * len(equation.outvars)

    stored = [_Parameter(None)] * (len(program.jaxpr.invars) - 1)
    results = evaluate(program, [*stored, images], rule, _has_marks)
    output = Node(("logits",), "output")
    output.read(program.jaxpr.outvars, results)
    return [*found, output]


def name_of(equation: Any) -> str:
    """Returns the name of an operation, or of the called function if the operation is a call."""
    if "name" in equation.params:
        return str(equation.params["name"])
    inner = [one.jaxpr.eqns for one in programs(equation) if len(one.jaxpr.eqns) == 1]
    return name_of(inner[0][0]) if inner else str(equation.primitive.name)


def _has_marks(program: Any) -> bool:
    return any(
        _MARK.search(str(equation.source_info.name_stack))
        or any(map(_has_marks, programs(equation)))
        for equation in program.jaxpr.eqns
    )
