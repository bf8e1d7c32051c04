"""What an equation of a traced program does with a value."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

from bnjax.train_step import forward
from bnjax.types import Array, Batch, BatchStats, Params

Path = tuple[str, ...]
# Marks are `name` operations, which change nothing: "bnjax:given:3" is what call 3 is given.
_MARK = "bnjax"
_SAME = ("name", "copy", "convert_element_type")
_MAXIMA = ("reduce_max", "reduce_window_max")
_SUMS = ("reduce_sum", "reduce_window_sum")


class Call(NamedTuple):
    """A call of a module: the path of its leaves, its fields, and the shape of its output."""

    path: Path
    module: Any
    returned: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Way:
    """From the output of one module to the input of another, which alone reads it.

    On the way values may be summed and maxima taken of values of one channel, so that with a gain
    a >= 0 and a shift b for each channel a * x + b becomes a * way(x) + factor * b.

    Attributes:
        end: the path of the module that is given the values.
        factor: see above.
        maxima: whether a maximum is taken; without one, any gain will do.
        spread: whether channels come out as several, `x.reshape(n, -1)` for instance: output j is
            of channel j modulo the number of channels.
    """

    end: Path
    factor: float = 1.0
    maxima: bool = False
    spread: bool = False


@dataclasses.dataclass(frozen=True)
class Flow:
    """How values go between the modules that were watched.

    Attributes:
        modules: their fields by their paths, in the order of their first calls.
        ways: from each of them; or why there is none, as a text that goes on after "its output".
        sources: the module whose output each of them is given; or as a text what it is given.
        computed: those whose parameters are made from the stored ones, as under `nn.WeightNorm`.
    """

    modules: Mapping[Path, Any]
    ways: Mapping[Path, Way | str]
    sources: Mapping[Path, Path | str]
    computed: frozenset[Path] = frozenset()


def flow(
    model: nn.Module,
    params: Params,
    batch_stats: BatchStats,
    batch: Batch,
    watched: Callable[[Any], bool],
) -> Flow:
    """Returns how values go between some modules of a network in evaluation; computes nothing.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        params: its parameters, or their shapes.
        batch_stats: likewise.
        batch: `image` [n, h, w, c], or its shape.
        watched: says of a module whether it is one of them.
    """
    calls: list[Call] = []

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        named = next((name for name in ("x", "inputs") if name in kwargs), None)
        if context.method_name != "__call__" or not watched(module):
            return call(*args, **kwargs)
        number, x = len(calls), args[0] if args else kwargs[named]
        own = Call(module.path, module.clone(parent=None, name=None))
        calls.append(own)
        for leaf in jax.tree.leaves(module.variables.get("params", {})):
            checkpoint_name(leaf, f"{_MARK}:parameter:{number}")  # only to see what it is made of
        x = checkpoint_name(x, f"{_MARK}:given:{number}")
        args, kwargs = ((x, *args[1:]), kwargs) if args else (args, kwargs | {named: x})
        y = call(*args, **kwargs)
        calls[number] = own._replace(returned=y.shape)
        return checkpoint_name(y, f"{_MARK}:returned:{number}")

    def run(params: Params, batch_stats: BatchStats, batch: Batch) -> Array:
        with nn.intercept_methods(intercept):
            return forward(params, batch_stats, batch, model=model, train=False)[0]

    program = jax.make_jaxpr(run)(params, batch_stats, {"image": batch["image"]}).jaxpr
    ways: dict[Path, list[Way | str]] = {}
    sources: dict[Path, list[Path | str]] = {}
    computed: dict[Path, list[None]] = {}
    of: dict[str, dict[Path, list[Any]]]
    of = {"returned": ways, "given": sources, "parameter": computed}
    for part in _parts(program):
        for role, number, way in _Part(part, calls).findings():
            of[role].setdefault(calls[number].path, []).append(way)
    return Flow(
        {one.path: one.module for one in calls},
        {
            path: _agreed(found, "goes to another place in each call")
            for path, found in ways.items()
        },
        {path: _agreed(found, "something else in each call") for path, found in sources.items()},
        frozenset(computed),
    )


class _Part:
    """One list of operations: the program, or the body of a loop or of another operation."""

    def __init__(self, jaxpr: Any, calls: list[Call]):
        self._jaxpr, self._calls = jaxpr, calls
        self._maker: dict[Any, Any] = {}
        self._readers: dict[Any, list[Any]] = {}
        for operation in jaxpr.eqns:
            for value in operation.invars:
                if isinstance(value, core.Var):
                    self._readers.setdefault(value, []).append(operation)
            for value in operation.outvars:
                self._maker[value] = operation

    def findings(self) -> Iterator[tuple[str, int, Any]]:
        """Yields for each mark its role, its call, and the way from it or what comes to it."""
        for operation in self._jaxpr.eqns:
            if (mark := _mark(operation)) is None:
                continue
            role, number, (value,) = *mark, operation.invars
            if role == "given":
                yield role, number, self._source(value)
            elif role == "parameter" and value in self._maker:
                yield role, number, None
            elif role == "returned" and self._is_used(operation.outvars[0]):
                yield role, number, self._way(operation.outvars[0], self._calls[number].returned)

    def _is_used(self, value: Any) -> bool:
        return bool(self._readers.get(value)) or value in self._jaxpr.outvars

    def _way(self, value: Any, shape: tuple[int, ...]) -> Way | str:
        way, channels = Way(()), shape[-1] if shape else 1
        # Under nn.vmap there is an axis more than the module saw, at a place that is not known.
        mapped = value.aval.shape != shape
        while True:
            if value in self._jaxpr.outvars:
                return "leaves the network, or the part of it that is repeated"
            readers = self._readers[value]
            if len(readers) > 1:
                return f"goes to several places ({', '.join(map(self._what, readers))})"
            (reader,) = readers
            mark = _mark(reader)
            if mark is not None and mark[0] == "given":
                return dataclasses.replace(way, end=self._calls[mark[1]].path)
            step = None if mapped and reader.primitive.name != "name" else _step(reader, channels)
            if step is None:
                return f"goes through {self._what(reader)}"
            way = Way(
                (),
                way.factor * step.factor,
                way.maxima or step.maxima,
                way.spread or step.spread,
            )
            (value,) = reader.outvars

    def _source(self, value: Any) -> Path | str:
        while isinstance(value, core.Var) and value in self._maker:
            maker = self._maker[value]
            mark = _mark(maker)
            if mark is not None and mark[0] == "returned":
                return self._calls[mark[1]].path
            if _step(maker, None) is None:
                return f"what comes from {self._what(maker)}"
            value = _operand(maker)
        return "what enters the network, or the part of it that is repeated"

    def _what(self, operation: Any) -> str:
        mark = _mark(operation)
        return _what(operation) if mark is None else ".".join(self._calls[mark[1]].path)


def _step(operation: Any, channels: int | None) -> Way | None:
    """Returns what an operation does to its only operand, or None if that is not to be moved past.

    It is to be if it is a sum or a maximum of values of one channel, a product with a number above
    0, or another place of the values. `channels` None: as many as the last axis of the operand has.
    """
    kind, params, operand = operation.primitive.name, operation.params, _operand(operation)
    if operand is None or len(operation.outvars) != 1:
        return None
    given, returned = operand.aval, operation.outvars[0].aval
    if kind in _SAME:
        floats = all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in (given, returned))
        return Way(()) if floats else None
    if not given.shape:
        return None
    last = len(given.shape) - 1
    if kind in ("mul", "div") and len(operation.invars) == 2:
        first, second = operation.invars
        if kind == "div" and isinstance(first, core.Literal):
            return None
        number = float((first if second is operand else second).val)
        return Way((), number if kind == "mul" else 1 / number) if number > 0 else None
    if kind == "transpose" and params["permutation"][last] == last:
        return Way(())
    if kind == "squeeze" and last not in params["dimensions"]:
        return Way(())
    if kind == "reshape" and params["dimensions"] is None:
        channels = given.shape[-1] if channels is None else channels
        if not returned.shape or returned.shape[-1] % channels:
            return None
        return Way((), spread=returned.shape[-1] != channels)
    # Sums and maxima over positions and examples, not over channels.
    if kind in ("reduce_sum", "reduce_max") and last not in params["axes"]:
        count = math.prod(given.shape[axis] for axis in params["axes"])
    elif kind in ("reduce_window_sum", "reduce_window_max"):
        window, padding = params["window_dimensions"], params["padding"]
        steps = (window[-1], params["window_strides"][-1], *params["base_dilation"])
        # Padding is 0 in a sum, and does not count in a maximum.
        padded = any(map(any, padding if kind in _SUMS else padding[-1:]))
        if padded or any(step != 1 for step in steps):
            return None
        count = math.prod(window)
    else:
        return None
    return Way((), maxima=True) if kind in _MAXIMA else Way((), float(count))


def _operand(operation: Any) -> Any:
    """Returns the value that an operation depends on, None if there are several."""
    values = [value for value in operation.invars if isinstance(value, core.Var)]
    return values[0] if len(values) == 1 else None


def _parts(jaxpr: Any) -> Iterator[Any]:
    """Yields a program and the bodies of its operations, each once."""
    left, seen = [jaxpr], set()
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        yield part
        left += [inner for operation in part.eqns for inner in _parts_of(operation)]


def _parts_of(operation: Any) -> Iterator[Any]:
    """Yields the bodies of an operation."""
    for value in operation.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
            if isinstance(inner, core.ClosedJaxpr):
                yield inner.jaxpr
            elif isinstance(inner, core.Jaxpr):
                yield inner


def _mark(operation: Any) -> tuple[str, int] | None:
    """Returns role and call of a mark."""
    words = str(operation.params.get("name")).split(":")
    if operation.primitive.name != "name" or words[0] != _MARK:
        return None
    return words[1], int(words[2])


def _what(operation: Any) -> str:
    """Returns what an operation is called, a function by the name that its author gave it."""
    if "name" in operation.params:
        return str(operation.params["name"])
    inner = [part for part in _parts_of(operation) if len(part.eqns) == 1]
    return _what(inner[0].eqns[0]) if inner else operation.primitive.name


def _agreed(found: list[Any], otherwise: str) -> Any:
    """Returns what is the same in all calls of a module."""
    return found[0] if len(set(found)) == 1 else otherwise
