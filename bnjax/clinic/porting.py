"""Weights and statistics of torch and Keras, there and back."""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.errors import UserError, brief
from bnjax.models.convnet import ConvNet
from bnjax.types import Array, BatchStats, Params

Framework = Literal["torch", "keras"]
Arrays = dict[str, np.ndarray]
# The running variance of each: divided by n or by n - 1. Keras 3; the fused kernel of TensorFlow,
# which Keras 2 uses for images, has the unbiased one, as torch.
STORED = {"torch": "unbiased", "keras": "biased"}
SEPARATOR = {"torch": ".", "keras": "/"}
# Their names of our leaves.
LEAVES: dict[str, dict[str, str]] = {
    "torch": {
        "kernel": "weight",
        "bias": "bias",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
        "count": "num_batches_tracked",
    },
    "keras": {
        "kernel": "kernel",
        "bias": "bias",  # of a norm "beta"
        "scale": "gamma",
        "mean": "moving_mean",
        "var": "moving_variance",
    },
}


def converted_momentum(framework: Framework, momentum: float) -> float:
    """Returns their momentum for ours, or ours for theirs: torch's is one minus the fraction kept.

    >>> converted_momentum("torch", 0.9), converted_momentum("keras", 0.9)
    (0.1, 0.9)
    """
    return float(f"{1 - momentum:.12g}") if framework == "torch" else momentum


@dataclasses.dataclass(frozen=True)
class Table:
    """The layers of ours and theirs that correspond.

    Attributes:
        names: our path of a layer, with dots, to their name of it. `{word}` stands for a part of
            one element of the path, the same on both sides, and the first row that fits counts:
            {"layer{s}_{b}.{name}": "layer{s}.{b}.{name}"}. None: all have the same names.
        flattened: our path of each layer whose input is flattened images, a dense one or a norm, to
            their shape [h, w, c]: torch has the channels first there, Flax and Keras last.
    """

    names: Mapping[str, str] | None = None
    flattened: Mapping[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)

    def name(self, layer: str, framework: Framework) -> str | None:
        """Returns their name of a layer of ours; None if no row fits.

        >>> Table({"block{i}.{name}": "features.{i}.{name}"}).name("block3.conv", "torch")
        'features.3.conv'
        """
        if self.names is None:
            return layer.replace(".", SEPARATOR[framework])
        for ours, theirs in self.names.items():
            pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>[^.]+?)", re.escape(ours))
            if fit := re.fullmatch(pattern, layer):
                return theirs.format(**fit.groupdict())
        return None


SAME_NAMES = Table()


def read_table(file: Path) -> Table:
    """Returns the table in a JSON file: an object with the attributes of `Table`, each optional.

    Raises:
        UserError: if the file is no such table.
    """
    try:
        content = json.loads(file.read_text())
        names, flattened = content.pop("names", None), content.pop("flattened", {})
        for ours, theirs in (names or {}).items():
            theirs.format(**dict.fromkeys(re.findall(r"{(\w+)}", ours), ""))
        shapes = {layer: (int(h), int(w), int(c)) for layer, (h, w, c) in flattened.items()}
        return Table(names, shapes, **content)
    except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise UserError(
            f"{file} is no table of layers ({error}). It is JSON, for instance "
            '{"names": {"conv{i}": "features.{i}"}, "flattened": {"dense0": [4, 4, 64]}}.'
        ) from error


def convnet_table(model: ConvNet, image_shape: tuple[int, int, int]) -> Table:
    """Returns the table of a network whose layers have the same names there.

    It says which layers are given flattened images [h, w, c].
    """
    first = "dense0" if model.dense else "logits"
    layers = [first]
    if model.placement == "pre" and model.norm is not None:
        layers.append(f"{first}_norm")
    height, width, channels = image_shape
    for filters, kernel, stride in zip(model.filters, model.kernels, model.strides, strict=True):
        shrunk = 0 if model.pooling == "none" else 1 - stride  # pooling rounds down
        height, width = ((side - kernel + shrunk) // stride + 1 for side in (height, width))
        channels = filters
    return Table(flattened=dict.fromkeys(layers, (height, width, channels)))


class _Entry(NamedTuple):
    """The place of a leaf of ours in their network.

    Attributes:
        path: ours, the collection first.
        rows: their order of our first axis, where that is flattened images.
        axes: ours in their order.
        shape: theirs.
    """

    path: tuple[str, ...]
    rows: Any
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def to(self, ours: np.ndarray) -> np.ndarray:
        """Returns the leaf in their layout, in new memory."""
        dtype = np.int64 if self.path[-1] == "count" else None
        return np.array(ours[self.rows].transpose(self.axes), dtype, order="C")

    def back(self, theirs: np.ndarray, like: Any) -> Array:
        """Returns the leaf in our layout and dtype."""
        ours = np.empty(like.shape, like.dtype)
        ours[self.rows] = theirs.reshape(self.shape).transpose(np.argsort(self.axes))
        return jnp.asarray(ours)

    def fits(self, theirs: tuple[int, ...], framework: Framework) -> bool:
        """Returns whether a leaf of theirs with this shape is this one."""
        if framework == "keras" and len(theirs) == 4 and self.shape[2:3] == (1,):
            # A depthwise kernel is [h, w, 1, c * multiplier] here and [h, w, c, multiplier] there.
            return theirs[:2] == self.shape[:2] and theirs[2] * theirs[3] == self.shape[3]
        return theirs == self.shape


def _entries(
    framework: Framework, params: Params, batch_stats: BatchStats, table: Table
) -> dict[str, _Entry]:
    """Returns each leaf's place in their network by its key there.

    Raises:
        UserError: if a layer has no name there, a leaf no counterpart, or two leaves the same.
    """
    leaves = flatten_dict({"params": params, "batch_stats": batch_stats})
    kernels = {path[1:-1] for path in leaves if path[-1] == "kernel"}
    layers = {".".join(path[1:-1]) for path in leaves}
    if unknown := {*table.flattened} - layers:
        raise UserError(f"under flattened, {', '.join(unknown)} is not in the network.")
    found: dict[str, _Entry] = {}
    for path, leaf in leaves.items():
        shape, rank, name, layer = tuple(leaf.shape), leaf.ndim, path[-1], ".".join(path[1:-1])
        theirs, there = LEAVES[framework].get(name), table.name(layer, framework)
        if there is None:
            raise UserError(f"no row of names in the table fits the layer {layer}.")
        if theirs is None or rank not in {"kernel": (2, 3, 4, 5), "count": (0,)}.get(name, (1,)):
            raise UserError(
                f"{'.'.join(path)}, of shape {list(shape)}, has no counterpart in {framework}. "
                f"What can be ported: {', '.join(LEAVES[framework])} of single layers; those that "
                "nn.scan or nn.vmap have stacked have to be taken apart first."
            )
        is_norm = path[1:-1] not in kernels
        if framework == "keras" and name == "bias" and is_norm:
            theirs = "beta"
        axes, rows = tuple(range(rank)), np.arange(shape[0]) if rank else ...
        if framework == "torch" and name == "kernel":  # out, in, positions
            axes = (rank - 1, rank - 2, *range(rank - 2))
        image = table.flattened.get(layer)
        if framework == "torch" and image and rank and (name == "kernel" or is_norm):
            if math.prod(image) != shape[0]:
                raise UserError(f"{'.'.join(path)} {list(shape)} takes no images {list(image)}.")
            # Flattened images have the channels first there.
            rows = np.arange(math.prod(image)).reshape(image).transpose(2, 0, 1).ravel()
        key = f"{there}{SEPARATOR[framework]}{theirs}" if there else theirs
        if key in found:
            raise UserError(
                f"{'.'.join(path)} and {'.'.join(found[key].path)} would both be {key}: give the "
                "layers different names in the table."
            )
        found[key] = _Entry(path, rows, axes, tuple(shape[i] for i in axes))
    return found


def _implied(framework: Framework, places: Mapping[str, _Entry]) -> list[Arrays]:
    """Returns, for each batch norm, the leaves of torch's without effect that ours does not have.

    A norm of torch has both scale and bias, or (affine=False) none.
    """
    found = []
    for key, entry in places.items():
        if framework == "torch" and entry.path[-1] == "mean":
            norm = key.removesuffix("running_mean")
            neutral: Arrays = {
                f"{norm}weight": np.ones(entry.shape, np.float32),
                f"{norm}bias": np.zeros(entry.shape, np.float32),
                f"{norm}num_batches_tracked": np.zeros((), np.int64),
            }
            found.append({key: value for key, value in neutral.items() if key not in places})
    return found


def port_to(
    framework: Framework, params: Params, batch_stats: BatchStats, table: Table = SAME_NAMES
) -> Arrays:
    """Returns the leaves of a network by their keys and in their layout.

    "torch": a `state_dict`. `num_batches_tracked` is the norm's `count`, or 0 if it has none: torch
    uses it only where its momentum is None. A norm with a scale or a bias alone gets the other one,
    as ones or zeros. "keras": arrays by "layer/variable", the paths of Keras' variables.

    Args:
        framework: theirs.
        params: the weights.
        batch_stats: the running statistics; perhaps empty.
        table: the names of the layers.

    Raises:
        UserError: if a layer has no name there, a leaf no counterpart, or two leaves the same.

    >>> dense = {"logits": {"kernel": np.ones((3, 2)), "bias": np.zeros(2)}}
    >>> {key: value.shape for key, value in port_to("torch", dense, {}).items()}
    {'logits.weight': (2, 3), 'logits.bias': (2,)}
    """
    leaves = flatten_dict({"params": params, "batch_stats": batch_stats})
    places = _entries(framework, params, batch_stats, table)
    found = {key: entry.to(np.asarray(leaves[entry.path])) for key, entry in places.items()}
    for neutral in _implied(framework, places):
        affine = {key for key in neutral if not key.endswith("num_batches_tracked")}
        found |= {key: neutral[key] for key in neutral if key not in affine or len(affine) == 1}
    return found


def port_from(
    framework: Framework,
    arrays: Mapping[str, Any],
    like: tuple[Params, BatchStats],
    table: Table = SAME_NAMES,
) -> tuple[Params, BatchStats]:
    """Returns the parameters and running statistics of a network of theirs.

    Numbers get the dtype that the leaf has here. `num_batches_tracked` becomes the norm's `count`,
    and is not needed where the norm has none; nor is a scale of ones or a bias of zeros where the
    norm has no such leaf.

    Args:
        framework: theirs.
        arrays: by key, as `port_to` returns them.
        like: params and batch_stats of the network here, as arrays or as their shapes.
        table: the names of the layers.

    Raises:
        UserError: if keys are left over on either side or shapes differ; all are listed.
    """
    places = _entries(framework, *like, table)
    neutral = {key: value for one in _implied(framework, places) for key, value in one.items()}
    lacking = [f"{key} ({'.'.join(of.path)})" for key, of in places.items() if key not in arrays]
    left = [
        key
        for key in arrays
        if key not in places
        and not (key in neutral and key.endswith("num_batches_tracked"))
        and not (key in neutral and np.array_equal(arrays[key], neutral[key]))
    ]
    shapes = [
        f"{key} is {list(np.shape(arrays[key]))} and has to be {list(entry.shape)}"
        for key, entry in places.items()
        if key in arrays and not entry.fits(np.shape(arrays[key]), framework)
    ]
    if lacking or left or shapes:
        raise UserError(
            "the two networks do not have the same layers."
            + _listed("Needed here, and not there", lacking)
            + _listed("There, and not needed here", left)
            + _listed("Of another shape", shapes)
            + "\nMend the table of names, or the network."
        )
    leaves = flatten_dict({"params": like[0], "batch_stats": like[1]})
    trees = unflatten_dict(
        {
            entry.path: entry.back(np.asarray(arrays[key]), leaves[entry.path])
            for key, entry in places.items()
        }
    )
    return trees.get("params", {}), trees.get("batch_stats", {})


def read(file: Path) -> Arrays:
    """Returns the arrays of a safetensors file by name; nothing is unpickled.

    Raises:
        UserError: if it is missing, another file, or damaged.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}.")
    try:
        with safetensors.safe_open(file, "np") as content:
            return {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{file} is no safetensors file, or damaged ({brief(error)}). Other "
            "files may run code when they are read; bnjax port --help says how to save this one."
        ) from error


def write(file: Path, arrays: Arrays) -> None:
    """Writes arrays by name as safetensors.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # safetensors writes memory as it lies, whatever the strides are.
        solid = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        safetensors.numpy.save_file(solid, file, {"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} cannot be written: {error}") from error


def _listed(title: str, lines: Iterable[str]) -> str:
    rows = [f"\n    {line}" for line in lines]
    return f"\n  {title}:{''.join(rows)}" if rows else ""
