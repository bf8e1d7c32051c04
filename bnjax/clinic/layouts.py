"""Which leaf of a network is which of PyTorch's or Keras': names, and the order of the axes."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from flax.traverse_util import flatten_dict

from bnjax.errors import UserError
from bnjax.types import BatchStats, Params

Framework = Literal["torch", "keras"]
SEPARATOR = {"torch": ".", "keras": "/"}
# What they call our leaves.
LEAVES: dict[str, dict[str, str]] = {
    "torch": {
        "kernel": "weight",
        "bias": "bias",
        "scale": "weight",
        "embedding": "weight",
        "mean": "running_mean",
        "var": "running_var",
        "count": "num_batches_tracked",
    },
    "keras": {
        "kernel": "kernel",
        "bias": "bias",
        "scale": "gamma",
        "embedding": "embeddings",
        "mean": "moving_mean",
        "var": "moving_variance",
    },
}
# In a layer that has none of our `kernel`, that is, in a norm.
NORM_LEAVES: dict[str, dict[str, str]] = {"torch": {}, "keras": {"bias": "beta"}}
# For a kernel of each rank, which of our axes (positions, in, out) theirs are. torch has a dense
# kernel as [out, in] and a convolution's as [out, in, height, width]; one with groups, depthwise
# too, likewise. Keras has what Flax has.
KERNEL_AXES: Mapping[str, Mapping[int, tuple[int, ...]]] = {
    "torch": {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)},
    "keras": {rank: tuple(range(rank)) for rank in (2, 3, 4, 5)},
}
# What a flattened image [h, w, c] is there: torch has channels first.
IMAGE_AXES: Mapping[str, tuple[int, int, int]] = {"torch": (2, 0, 1), "keras": (0, 1, 2)}
_WORD = re.compile(r"\{(\w+)\}")


class PortError(UserError):
    """The two networks do not have the same layers, or do not compute the same."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Which layer of ours is which of theirs.

    Attributes:
        names: our path of a layer, with dots, to their name of it. `{word}` stands for a part of
            one element of the path, the same on both sides, and the first row that fits counts:
            {"layer{s}_{b}.{name}": "layer{s}.{b}.{name}"}. None: all are called the same.
        flattened: our path of each layer that is given flattened images, a dense one or a norm, to
            their shape [h, w, c]: torch has the channels first there, Flax and Keras last.
        depthwise: our path of each convolution that is a DepthwiseConv2D of Keras, to its
            depth_multiplier. torch has no such layer: there it is a Conv2d with groups.
    """

    names: Mapping[str, str] | None = None
    flattened: Mapping[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    depthwise: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def name(self, layer: str, framework: Framework) -> str | None:
        """Returns their name of a layer of ours; None if no row fits.

        >>> Table({"block{i}.{name}": "features.{i}.{name}"}).name("block3.conv", "torch")
        'features.3.conv'
        """
        if self.names is None:
            return layer.replace(".", SEPARATOR[framework])
        for ours, theirs in self.names.items():
            if fit := re.fullmatch(_regex(ours), layer):
                words = fit.groupdict()
                return _WORD.sub(lambda word: words[word[1]], theirs)  # noqa: B023
        return None


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a leaf of ours is in their network: reshaped to `split`, transposed, reshaped again.

    Attributes:
        key: theirs.
        path: ours, the collection first.
        split, axes: see above.
        shape: theirs.
    """

    key: str
    path: tuple[str, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def to(self, ours: np.ndarray) -> np.ndarray:
        """Returns the leaf as they have it, in memory of its own."""
        there = ours.reshape(self.split).transpose(self.axes).reshape(self.shape)
        return np.array(there, np.int64 if self.path[-1] == "count" else None, order="C")

    def back(self, theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the leaf as we have it, of our shape."""
        there = theirs.reshape([self.split[axis] for axis in self.axes])
        return there.transpose(np.argsort(self.axes)).reshape(shape)


def entries(
    framework: Framework, params: Params, batch_stats: BatchStats, table: Table
) -> tuple[Entry, ...]:
    """Returns where each leaf is.

    Args:
        framework: theirs.
        params: the weights, or their shapes.
        batch_stats: likewise.
        table: the names of the layers.

    Raises:
        PortError: if a layer has no name there, a leaf no counterpart, or two leaves the same.
    """
    leaves = flatten_dict({"params": params, "batch_stats": batch_stats})
    kernels = {path[1:-1] for path in leaves if path[-1] == "kernel"}
    layers = {".".join(path[1:-1]) for path in leaves}
    nameless = sorted(layer for layer in layers if table.name(layer, framework) is None)
    unknown = sorted({*table.flattened, *table.depthwise} - layers)
    if nameless or unknown:
        raise PortError(
            "the table does not fit the network."
            + listed("Layers that no row of names fits", nameless)
            + listed("Layers under flattened or depthwise that are not in the network", unknown)
        )
    found: dict[str, Entry] = {}
    for path, leaf in leaves.items():
        entry = _entry(framework, path, tuple(leaf.shape), table, path[1:-1] not in kernels)
        if entry.key in found:
            raise PortError(
                f"{'.'.join(path)} and {'.'.join(found[entry.key].path)} would both be {entry.key}."
                " Give the layers names of their own in the table."
            )
        found[entry.key] = entry
    return tuple(found.values())


def _entry(
    framework: Framework, path: tuple[str, ...], shape: tuple[int, ...], table: Table, norm: bool
) -> Entry:
    layer, leaf = ".".join(path[1:-1]), path[-1]
    theirs = (LEAVES[framework] | (NORM_LEAVES[framework] if norm else {})).get(leaf)
    ranks = {"kernel": tuple(KERNEL_AXES[framework]), "embedding": (2,), "count": (0,)}
    if theirs is None or len(shape) not in ranks.get(leaf, (1,)):
        raise PortError(
            f"{'.'.join(path)}, of shape {list(shape)}, has no counterpart in {framework}. What "
            f"can be ported: {', '.join(LEAVES[framework])} of layers one by one, so those that "
            "nn.scan or nn.vmap have stacked have to be taken apart first."
        )
    there = table.name(layer, framework)
    key = f"{there}{SEPARATOR[framework]}{theirs}" if there else theirs
    axes = KERNEL_AXES[framework][len(shape)] if leaf == "kernel" else tuple(range(len(shape)))
    theirs_shape = tuple(shape[axis] for axis in axes)
    split = shape
    if layer in table.flattened and (leaf == "kernel" or norm) and shape:
        # Our first axis is the flattened image; its own three come in its place.
        split = (*table.flattened[layer], *shape[1:])
        image = IMAGE_AXES[framework]
        axes = tuple(x for axis in axes for x in (image if axis == 0 else (axis + 2,)))
        if math.prod(split) != math.prod(shape):
            raise PortError(
                f"{'.'.join(path)} has the shape {list(shape)}, and the table says that its layer "
                f"is given flattened images of {list(table.flattened[layer])}."
            )
    if leaf == "kernel" and framework == "keras" and layer in table.depthwise:
        factor = table.depthwise[layer]
        if len(shape) != 4 or shape[2] != 1 or shape[3] % factor:
            raise PortError(
                f"{'.'.join(path)} has the shape {list(shape)}, and a depthwise convolution with "
                f"the multiplier {factor} has [height, width, 1, channels * {factor}]."
            )
        theirs_shape = (*shape[:2], shape[3] // factor, factor)
    return Entry(key, path, split, axes, theirs_shape)


def read_table(file: Path) -> Table:
    """Returns the table in a JSON file: an object with the attributes of `Table`, each optional.

    Raises:
        PortError: if it is none.
    """
    try:
        content = json.loads(file.read_text())
        names = content.pop("names", None)
        flattened, depthwise = content.pop("flattened", {}), content.pop("depthwise", {})
        if content:
            raise ValueError(f"unknown: {', '.join(content)}")
        for ours, theirs in (names or {}).items():
            if strange := {*_WORD.findall(theirs)} - {*_WORD.findall(ours)}:
                raise ValueError(f"{theirs!r} has {strange}, and {ours!r} has not")
        return Table(
            names,
            {layer: (int(h), int(w), int(c)) for layer, (h, w, c) in flattened.items()},
            {layer: int(factor) for layer, factor in depthwise.items()},
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise PortError(
            f"{file} is no table of layers ({error}). It is JSON, for instance "
            '{"names": {"conv{i}": "features.{i}"}, "flattened": {"dense0": [4, 4, 64]}}.'
        ) from error


def listed(title: str, lines: Iterable[str]) -> str:
    """Returns a heading with a line for each entry; nothing if there are none."""
    rows = [f"\n    {line}" for line in lines]
    return f"\n  {title}:{''.join(rows)}" if rows else ""


def _regex(pattern: str) -> str:
    """Returns the regular expression of a pattern; a word that comes again is the same again."""
    parts, seen = [], set[str]()
    for i, part in enumerate(_WORD.split(pattern)):
        if i % 2 == 0:
            parts.append(re.escape(part))
        else:
            parts.append(f"(?P={part})" if part in seen else rf"(?P<{part}>[^.]+?)")
            seen.add(part)
    return "".join(parts)
