"""Reads the operations in the text of a compiled program."""

import math
import re
from typing import Literal, NamedTuple

BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
}
LINE = r"^ *(?:ROOT )?(%[\w.-]+) = (.+?) ([a-z][\w-]*)\(([^)]*)\)(.*)$"
OPERATION = re.compile(LINE, re.MULTILINE)


class Operation(NamedTuple):
    """A line of a program."""

    name: str
    of: str  # its type
    kind: str
    operands: tuple[str, ...]
    rest: str  # its attributes


Array = tuple[str, tuple[int, ...]]  # dtype and shape


def operations(text: str) -> list[Operation]:
    """Returns the lines of a program, including those of nested computations."""
    lines = (found.groups() for found in OPERATION.finditer(text))
    return [
        Operation(name, of, kind, (*re.findall(r"%[\w.-]+", operands),), rest)
        for name, of, kind, operands, rest in lines
    ]


def arrays(of: str) -> list[Array]:
    """Returns dtype and shape of each array in the type of an operation."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"\{[^}]*\}", "", of))
    return [(dtype, tuple(map(int, filter(None, sizes.split(","))))) for dtype, sizes in found]


def bytes_of(array: Array) -> int:
    """Returns the size of an array."""
    return math.prod(array[1]) * BYTES.get(array[0], 0)


Use = Literal["moments", "averages", "gradients", "metrics"]
WORK = ("fusion", "convolution", "dot", "custom-call")
NORM = re.compile(r"(?:[\w.]+/)?[\w.]*_norm(?=[/.])")
_NAME = re.compile(r'op_name="([^"]*)"')
# Devices that reduce together: named axes of a mesh, lists, or an array [groups, of each].
_MESH = re.compile(r"replica_groups=@?mesh\w*\[([^\]]*)\] ?\{([^}]*)\}")
_LISTS = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_ARRAY = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")


class Reduction(NamedTuple):
    """An all-reduce of a training step.

    Attributes:
        use: what it reduces. "moments": sums on which batch norms wait, forward and backward;
            "averages": their running averages; "gradients": gradients of the parameters, and other
            sums merged with them; "metrics": integers.
        bytes: the number of bytes that one device contributes.
        arrays: the number of arrays that were combined.
        devices: the number of devices that reduce together.
        overlapped: operations between its start and its end; 0 if it blocks.
    """

    use: Use
    bytes: int
    arrays: int
    devices: int
    overlapped: int


def reductions(text: str, devices: int) -> list[Reduction]:
    """Returns the all-reduces of a program for several devices, in program order.

    The names of the modules determine the use of each all-reduce; norms are named `..._norm`.
    """
    lines, found = operations(text), []
    made_by = {line.name: _name(line) for line in lines}
    done = {line.operands[0]: i for i, line in enumerate(lines) if line.kind == "all-reduce-done"}
    for i, line in enumerate(lines):
        if line.kind not in ("all-reduce", "all-reduce-start"):
            continue
        # One that is only started shows its operands, and then its results.
        given = arrays(line.of)[: len(line.operands)]
        between = lines[i + 1 : done.get(line.name, i)]
        found.append(
            Reduction(
                use_of(_name(line), [made_by.get(one, "") for one in line.operands], given),
                sum(map(bytes_of, given)),
                len(given),
                group_size(line.rest, devices),
                sum(one.kind in WORK for one in between),
            )
        )
    return found


def use_of(name: str, sources: list[str], given: list[Array]) -> Use:
    """Returns the use of an all-reduce.

    Args:
        name: what the program calls it, after the module that asked for it. One that was combined
            has the name of its first part, or those of all.
        sources: what made its operands, as far as it is known.
        given: the operands.
    """
    norms, parts = set(NORM.findall(name)), [NORM.search(part) for part in name.split(":")]
    if all(dtype in ("s32", "u32") for dtype, _ in given):
        return "metrics"
    if "_batch_moments" in name:
        return "moments"
    if all(parts) and not any("transpose(" in one for one in (name, *sources)):
        return "averages"
    # Backward a norm has two sums, and that of a block's shortcut may come with another of the
    # block. What is combined from more layers is needed after the backward pass only.
    is_one = len(norms) in (1, 2) and len(given) <= 4 and all(shape for _, shape in given)
    return "moments" if is_one and all(parts) and "transpose(" in name else "gradients"


def _name(line: Operation) -> str:
    found = _NAME.search(line.rest)
    return found[1] if found else ""


def group_size(attributes: str, devices: int) -> int:
    """Returns the number of devices that reduce together.

    >>> group_size("replica_groups=mesh['groups'=4,'members'=8] {'members'}", 32)
    8
    >>> [group_size(f"replica_groups={of}", 4) for of in ("{{0,1},{2,3}}", "[1,4]<=[4]", "{}")]
    [2, 4, 4]
    """
    if found := _MESH.search(attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", found[2]))
    if found := _LISTS.search(attributes):
        return len(found[1].split(","))
    return int(found[1]) if (found := _ARRAY.search(attributes)) else devices
