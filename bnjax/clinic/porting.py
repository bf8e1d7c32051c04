"""Weights and statistics of torch and Keras, there and back."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.linen import NormLayer
from bnjax.errors import UserError
from bnjax.models.convnet import ConvNet
from bnjax.train_step import forward
from bnjax.types import Array, BatchStats, Images, Params

Framework = Literal["torch", "keras"]
# What the running variance is an average of: the batch's, divided by n or by n - 1. Keras 3; the
# fused kernel of TensorFlow, which Keras 2 uses for images, has the unbiased one, as torch.
STORED = {"torch": "unbiased", "keras": "biased"}


def norm_fields(framework: Framework, epsilon: float, momentum: Any) -> dict[str, Any]:
    """Returns the constructor's arguments of their batch norm.

    Args:
        framework: theirs.
        epsilon: added to the variance; the same everywhere.
        momentum: of ours, the fraction of the old average that is kept, as in Keras; torch's is one
            minus it. None is the mean of all batches, which Keras has not.

    Raises:
        PortError: for a momentum that they have not.

    >>> norm_fields("torch", 1e-3, 0.75)
    {'eps': 0.001, 'momentum': 0.25}
    """
    if callable(momentum) or (momentum is None and framework == "keras"):
        raise PortError(
            f"a norm with momentum = {momentum} has no counterpart in {framework}, where it is a "
            "number. Give the model one; evaluation does not depend on it."
        )
    if framework == "keras":
        return {"epsilon": epsilon, "momentum": momentum}
    return {"eps": epsilon, "momentum": None if momentum is None else _one_minus(momentum)}


def our_fields(framework: Framework, epsilon: float, momentum: float | None) -> dict[str, Any]:
    """Returns the arguments of `bnjax.norms.BatchNorm` that mean the same as theirs.

    Args:
        framework: theirs.
        epsilon: torch's `eps`, Keras' `epsilon`.
        momentum: theirs; None is torch's mean of all batches.

    >>> our_fields("torch", 1e-5, 0.1)
    {'epsilon': 1e-05, 'momentum': 0.9, 'variance': 'unbiased'}
    """
    if framework == "torch" and momentum is not None:
        momentum = _one_minus(momentum)
    return {"epsilon": epsilon, "momentum": momentum, "variance": STORED[framework]}


def variance_factor(stored: str, wanted: str, n: int) -> float:
    """Returns what turns a variance that was stored in one way into that of another.

    Exact for an average that has forgotten its initial value: each update was of n values.

    Args:
        stored: "biased", divided by n, or "unbiased", by n - 1.
        wanted: likewise.
        n: the values per channel of a training batch, at least 2.

    >>> variance_factor("unbiased", "biased", 8)
    0.875
    """
    if n < 2:
        raise PortError(f"a variance of {n} value per channel has no unbiased form: n is 2 or more")
    return {("biased", "unbiased"): n / (n - 1), ("unbiased", "biased"): (n - 1) / n}.get(
        (stored, wanted), 1.0
    )


def convert_variance(
    batch_stats: BatchStats,
    layers: Iterable[NormLayer],
    examples: int,
    *,
    stored: str | None = None,
    wanted: str | None = None,
) -> BatchStats:
    """Returns running statistics whose variances are what `wanted` says instead of `stored`.

    Evaluation takes the running variance as it is, so that this changes the logits, by as much as
    1 / n changes a variance: they become what they would be, had the network been trained in the
    other framework. For equal logits leave the numbers as they are, and whoever trains on forgets
    the difference with the average.

    Args:
        batch_stats: the averages.
        layers: from `Network.norms`: what each stores, and how many values an example gives it.
        examples: that a training batch had, on all devices over which the statistics were taken;
            n is this times the positions.
        stored: "biased" or "unbiased"; None: what each norm here stores.
        wanted: likewise.

    Raises:
        PortError: for a norm that does not reduce over the examples, or n = 1.
    """
    leaves = flatten_dict(batch_stats)
    for layer in layers:
        if 0 not in layer.axes:
            raise PortError(f"the norm {layer.name} does not reduce over the examples of a batch")
        positions = math.prod(layer.shape[axis] for axis in layer.axes if axis != 0)
        factor = variance_factor(
            stored or layer.variance, wanted or layer.variance, examples * positions
        )
        path = (*layer.path, "var")
        leaves[path] = (leaves[path] * factor).astype(jnp.result_type(leaves[path]))
    return unflatten_dict(leaves)


def _one_minus(momentum: float) -> float:
    """Returns 1 - momentum without the digits that binary numbers add to it."""
    return float(f"{1 - momentum:.12g}")


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


Arrays = dict[str, np.ndarray]
_SAVE = {
    b"\x80": "from safetensors.torch import save_file; save_file(model.state_dict(), FILE)",
    b"PK": "from safetensors.torch import save_file; save_file(model.state_dict(), FILE)",
    b"\x89HDF": "from safetensors.numpy import save_file; "
    "save_file({v.path: v.numpy() for v in model.weights}, FILE)",
}


def read(file: Path) -> tuple[Arrays, dict[str, str]]:
    """Returns the arrays of a safetensors file by name, and its notes; nothing is unpickled.

    Raises:
        UserError: if it is another file, or damaged.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}.")
    with file.open("rb") as stream:
        start = stream.read(8)
    for first, how in _SAVE.items():
        if start.startswith(first):
            raise UserError(
                f"{file} is a pickle, an archive of one or HDF5, which may run code when it is "
                f"read or whose names depend on the version. Save safetensors: {how}."
            )
    try:
        with safetensors.safe_open(file, "np") as content:
            arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            return arrays, dict(content.metadata() or {})
    except (safetensors.SafetensorError, ValueError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{file} is no safetensors file, or damaged: {reason}") from error


def write(file: Path, arrays: Arrays, notes: dict[str, str]) -> None:
    """Writes arrays by name as safetensors.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # safetensors writes memory as it lies, whatever the strides are.
        solid = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        safetensors.numpy.save_file(solid, file, notes)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} cannot be written: {error}") from error


def convnet_table(model: ConvNet, image_shape: tuple[int, int, int]) -> Table:
    """Returns the table of a network whose layers have the same names there.

    It says which layers are given flattened images [h, w, c].
    """
    first = "dense0" if model.dense else "logits"
    layers = [first, f"{first}_norm"] if model.placement == "pre" else [first]
    height, width, channels = image_shape
    for filters, kernel, stride in zip(model.filters, model.kernels, model.strides, strict=True):
        shrunk = 0 if model.pooling == "none" else 1 - stride  # pooling rounds down
        height, width = ((side - kernel + shrunk) // stride + 1 for side in (height, width))
        channels = filters
    norms = {layer for layer in layers if layer.endswith("_norm") and model.norm is None}
    return Table(
        flattened={layer: (height, width, channels) for layer in layers if layer not in norms}
    )


TOLERANCE = 1e-4  # of logits
SAME_NAMES = Table()


def port_to(
    framework: Framework, params: Params, batch_stats: BatchStats, table: Table = SAME_NAMES
) -> dict[str, np.ndarray]:
    """Returns the leaves of a network by their keys and in their layout.

    "torch": a `state_dict`. `num_batches_tracked` is the norm's `count`, or 0 if it has none: torch
    uses it only where its momentum is None. A norm there has both scale and bias or none of them,
    so that one that is lacking is put in as ones or zeros. "keras": arrays by "layer/variable", the
    paths of Keras' variables.

    Args:
        framework: theirs.
        params: the weights.
        batch_stats: the running statistics; perhaps empty.
        table: the names of the layers.

    Raises:
        PortError: if a layer has no name there, a leaf no counterpart, or two leaves the same.

    >>> dense = {"logits": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}}
    >>> {key: value.shape for key, value in port_to("torch", dense, {}).items()}
    {'logits.weight': (2, 3), 'logits.bias': (2,)}
    """
    leaves = flatten_dict({"params": params, "batch_stats": batch_stats})
    places = entries(framework, params, batch_stats, table)
    found = {entry.key: entry.to(np.asarray(leaves[entry.path])) for entry in places}
    for implied in _implied(framework, places):
        affine = {key for key in implied if not key.endswith("num_batches_tracked")}
        # A torch norm without both is one with affine=False, which has neither.
        found |= {key: implied[key] for key in implied if key not in affine or len(affine) == 1}
    return found


def port_from(
    framework: Framework,
    arrays: Mapping[str, Any],
    like: tuple[Params, BatchStats],
    table: Table = SAME_NAMES,
) -> tuple[Params, BatchStats]:
    """Returns the parameters and running statistics that a network of theirs has.

    Numbers get the dtype that the leaf has here. `num_batches_tracked` becomes the norm's `count`,
    and is not needed where the norm has none; nor is a scale of ones or a bias of zeros where the
    norm has no such leaf.

    Args:
        framework: theirs.
        arrays: by key, as `port_to` returns them.
        like: params and batch_stats of the network here, as arrays or as their shapes.
        table: the names of the layers.

    Raises:
        PortError: if keys are left over on either side or shapes differ; all are listed.
    """
    places = entries(framework, *like, table)
    keys = {entry.key for entry in places}
    neutral = {key: value for one in _implied(framework, places) for key, value in one.items()}
    lacking = [f"{e.key} ({'.'.join(e.path)})" for e in places if e.key not in arrays]
    left = [key for key in arrays if key not in keys and not _is_neutral(key, arrays, neutral)]
    shapes = [
        f"{entry.key} is {list(np.shape(arrays[entry.key]))} and has to be {list(entry.shape)}"
        for entry in places
        if entry.key in arrays and np.shape(arrays[entry.key]) != entry.shape
    ]
    if lacking or left or shapes:
        raise PortError(
            "the two networks do not have the same layers."
            + listed("Needed here, and not there", lacking)
            + listed("There, and not needed here", left)
            + listed("Of another shape", shapes)
            + "\nMend the table of names, or the network."
        )
    leaves = flatten_dict({"params": like[0], "batch_stats": like[1]})
    found = {}
    for entry in places:
        leaf = leaves[entry.path]
        ours = entry.back(np.asarray(arrays[entry.key]), leaf.shape)
        found[entry.path] = jnp.asarray(ours.astype(leaf.dtype))
    trees = unflatten_dict(found)
    return trees.get("params", {}), trees.get("batch_stats", {})


def check_logits(
    model: nn.Module,
    params: Params,
    batch_stats: BatchStats,
    images: Images,
    logits: Array,
    tolerance: float = TOLERANCE,
) -> float:
    """Returns the largest difference of the logits in evaluation from those that are expected.

    Products are of float32 operands, whatever the device prefers.

    Args:
        model: any linen module with `__call__(x, train=...)`.
        params: its weights.
        batch_stats: its running statistics.
        images: the probe batch [n, h, w, c], as for `train_step`.
        logits: [n, classes], what the other network computes of it.
        tolerance: the largest difference that is accepted.

    Raises:
        PortError: if it is larger, or not a number.
    """
    with jax.default_matmul_precision("highest"):
        found, _ = forward(params, batch_stats, {"image": images}, model=model, train=False)
    if found.shape != logits.shape:
        raise PortError(
            f"the logits of the probe batch have the shape {list(found.shape)}, and those that "
            f"are expected {list(logits.shape)}."
        )
    differences = np.abs(np.asarray(found, np.float64) - np.asarray(logits, np.float64))
    largest = float(differences.max())
    if not largest <= tolerance:
        raise PortError(
            f"the logits of the probe batch differ by up to {largest:.2g} from those that are "
            f"expected, and at most {tolerance:g} is accepted: the two networks do not compute "
            "the same. Usual reasons: another epsilon (torch's default is 1e-5, that of Keras "
            "1e-3); another padding (where it strides, SAME pads the sides unequally, and torch "
            "never does); a dense layer after flattened images that the table does not name under "
            "flattened; images on another scale; expected logits of training mode."
        )
    return largest


def _implied(framework: Framework, places: tuple[Entry, ...]) -> list[dict[str, np.ndarray]]:
    """Returns, for each batch norm, what torch's has and ours has not, and computes the same."""
    if framework != "torch":
        return []
    keys, found = {entry.key for entry in places}, []
    for entry in places:
        if entry.path[-1] == "mean":
            prefix = entry.key.removesuffix("running_mean")
            neutral: dict[str, np.ndarray] = {
                f"{prefix}weight": np.ones(entry.shape, np.float32),
                f"{prefix}bias": np.zeros(entry.shape, np.float32),
                f"{prefix}num_batches_tracked": np.zeros((), np.int64),
            }
            found.append({key: value for key, value in neutral.items() if key not in keys})
    return found


def _is_neutral(key: str, arrays: Mapping[str, Any], neutral: Mapping[str, np.ndarray]) -> bool:
    """Returns whether the network here does the same without this array of theirs."""
    if key not in neutral:
        return False
    return key.endswith("num_batches_tracked") or np.array_equal(arrays[key], neutral[key])
