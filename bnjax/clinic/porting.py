"""Converts weights and statistics to and from torch and Keras, and between JAX libraries."""

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

from bnjax.clinic.network import Network, SameNetwork
from bnjax.errors import UserError, brief
from bnjax.models.convnet import ConvNet
from bnjax.types import Array, BatchStats, Params

Framework = Literal["torch", "keras"]
Arrays = dict[str, np.ndarray]
# The kind of running variance: the divisor is n (biased) or n - 1 (unbiased). "keras" is Keras 3;
# for images, Keras 2 uses TensorFlow's fused kernel with the unbiased variance, as in torch.
VARIANCE = {"torch": "unbiased", "keras": "biased"}
SEPARATOR = {"torch": ".", "keras": "/"}
# Maps our leaf names to the leaf names in each framework.
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
        "bias": "bias",  # "beta" in a norm
        "scale": "gamma",
        "mean": "moving_mean",
        "var": "moving_variance",
    },
}


def converted_momentum(framework: Framework, momentum: float) -> float:
    """Converts a momentum to or from a framework's convention; torch's momentum is 1 - ours.

    >>> converted_momentum("torch", 0.9), converted_momentum("keras", 0.9)
    (0.1, 0.9)
    """
    return float(f"{1 - momentum:.12g}") if framework == "torch" else momentum


@dataclasses.dataclass(frozen=True)
class Table:
    """The mapping from our layers to the framework's layers.

    Attributes:
        names: maps our dotted layer path to the framework's name, for instance
            {"layer{s}_{b}.{name}": "layer{s}.{b}.{name}"}. `{word}` matches a part of one path
            element and stands for the same text on both sides. The first matching row applies.
            None if the names are equal.
        flattened: maps our path of each dense layer or norm whose input consists of flattened
            images to the images' shape [h, w, c]. This is needed because torch has channels first
            when it flattens, but Flax and Keras have channels last.
    """

    names: Mapping[str, str] | None = None
    flattened: Mapping[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)

    def name(self, layer: str, framework: Framework) -> str | None:
        """Returns the framework's name for our layer; None if no row matches.

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
    """Reads a table from a JSON file: an object with any of the attributes of `Table`.

    Raises:
        UserError: if the file is not a valid table.
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
            f"{file} is not a valid table of layers ({error}). Write JSON, for instance "
            '{"names": {"conv{i}": "features.{i}"}, "flattened": {"dense0": [4, 4, 64]}}.'
        ) from error


def convnet_table(model: ConvNet, image_shape: tuple[int, int, int]) -> Table:
    """Returns the table for porting a `ConvNet`, in which no layer is renamed.

    Its entry `flattened` has the first dense layer, and the norm before that layer if there is one.
    """
    first = "dense0" if model.dense else "logits"
    layers = [first]
    if model.placement == "pre" and model.norm is not None:
        layers.append(f"{first}_norm")
    height, width, channels = image_shape
    for filters, kernel, stride in zip(model.filters, model.kernels, model.strides, strict=True):
        shrunk = 0 if model.pooling == "none" else 1 - stride  # pooling rounds sizes down
        height, width = ((side - kernel + shrunk) // stride + 1 for side in (height, width))
        channels = filters
    return Table(flattened=dict.fromkeys(layers, (height, width, channels)))


class _Entry(NamedTuple):
    """The layout of one of our leaves in the framework.

    Attributes:
        path: our path of the leaf, which starts with the collection.
        rows: the indices of our first axis in the framework's order, for flattened images.
        axes: our axes in the framework's order.
        shape: the shape in the framework.
    """

    path: tuple[str, ...]
    rows: Any
    axes: tuple[int, ...]
    shape: tuple[int, ...]

    def to(self, ours: np.ndarray) -> np.ndarray:
        """Returns a copy of our leaf in the framework's layout."""
        dtype = np.int64 if self.path[-1] == "count" else None
        return np.array(ours[self.rows].transpose(self.axes), dtype, order="C")

    def back(self, theirs: np.ndarray, like: Any) -> Array:
        """Returns the framework's leaf in our layout and dtype."""
        ours = np.empty(like.shape, like.dtype)
        ours[self.rows] = theirs.reshape(self.shape).transpose(np.argsort(self.axes))
        return jnp.asarray(ours)

    def fits(self, theirs: tuple[int, ...], framework: Framework) -> bool:
        """Returns whether the framework's leaf has a suitable shape."""
        if framework == "keras" and len(theirs) == 4 and self.shape[2:3] == (1,):
            # A depthwise kernel: [h, w, 1, c * multiplier] here, [h, w, c, multiplier] in Keras.
            return theirs[:2] == self.shape[:2] and theirs[2] * theirs[3] == self.shape[3]
        return theirs == self.shape


def _entries(
    framework: Framework, params: Params, batch_stats: BatchStats, table: Table
) -> dict[str, _Entry]:
    """Maps the framework's key of each leaf to the leaf's layout."""
    leaves = flatten_dict({"params": params, "batch_stats": batch_stats})
    kernels = {path[1:-1] for path in leaves if path[-1] == "kernel"}
    layers = {".".join(path[1:-1]) for path in leaves}
    if unknown := {*table.flattened} - layers:
        raise UserError(
            f"`flattened` has layers that are not in the network: {', '.join(unknown)}."
        )
    found: dict[str, _Entry] = {}
    for path, leaf in leaves.items():
        shape, rank, name, layer = tuple(leaf.shape), leaf.ndim, path[-1], ".".join(path[1:-1])
        theirs, there = LEAVES[framework].get(name), table.name(layer, framework)
        if there is None:
            raise UserError(f"no row under `names` in the table matches the layer {layer}.")
        if theirs is None or rank not in {"kernel": (2, 3, 4, 5), "count": (0,)}.get(name, (1,)):
            raise UserError(
                f"{'.'.join(path)}, of shape {list(shape)}, has no counterpart in {framework}. "
                f"The supported leaves are {', '.join(LEAVES[framework])} of single layers; split "
                "layers that are stacked by nn.scan or nn.vmap first."
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
                raise UserError(
                    f"{'.'.join(path)} {list(shape)} does not fit flattened {list(image)}."
                )
            # torch flattens images with channels first.
            rows = np.arange(math.prod(image)).reshape(image).transpose(2, 0, 1).ravel()
        key = f"{there}{SEPARATOR[framework]}{theirs}" if there else theirs
        if key in found:
            raise UserError(
                f"{'.'.join(path)} and {'.'.join(found[key].path)} would both be {key}. Give the "
                "layers different names in the table."
            )
        found[key] = _Entry(path, rows, axes, tuple(shape[i] for i in axes))
    return found


def _implied(framework: Framework, places: Mapping[str, _Entry]) -> list[Arrays]:
    """Returns for each norm neutral values of the leaves that torch has and the norm lacks.

    A norm in torch has both scale and bias, or neither if affine=False.
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
    """Converts the leaves of a network to a framework's keys and layouts.

    For "torch" the result is a `state_dict`. `num_batches_tracked` is the norm's `count`, or 0
    without a count; torch uses the value only if the momentum is None. If a norm has only a bias or
    only a scale, a scale of ones or a bias of zeros is added. For "keras" the keys are the
    paths of Keras variables, "layer/variable".

    Args:
        framework: the target framework.
        params: the weights.
        batch_stats: the running statistics; may be empty.
        table: the mapping of the layers.

    Raises:
        UserError: if a layer has no name in the framework, a leaf has no counterpart, or two leaves
            have the same key.

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
    """Builds parameters and running statistics from the arrays of another framework.

    Leaves have the dtypes of `like`. `num_batches_tracked` becomes the norm's `count`. If the norm
    has no `count`, `scale` or `bias`, the corresponding array may be present but is ignored; a
    scale must then be 1 and a bias 0.

    Args:
        framework: the source framework.
        arrays: the arrays, keyed as in the result of `port_to`.
        like: the params and batch_stats of the network, as arrays or shapes.
        table: the mapping of the layers.

    Raises:
        UserError: if keys are missing or unused, or shapes differ; the message lists the keys.
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
        f"{key} is {list(np.shape(arrays[key]))}, but must be {list(entry.shape)}"
        for key, entry in places.items()
        if key in arrays and not entry.fits(np.shape(arrays[key]), framework)
    ]
    if lacking or left or shapes:
        raise UserError(
            "the two networks do not have the same layers."
            + _listed("Missing in the arrays", lacking)
            + _listed("Not in this network", sorted(left))
            + _listed("Different shapes", shapes)
            + "\nCorrect the table of names, or the network."
        )
    leaves = flatten_dict({"params": like[0], "batch_stats": like[1]})
    trees = unflatten_dict(
        {
            entry.path: entry.back(np.asarray(arrays[key]), leaves[entry.path])
            for key, entry in places.items()
        }
    )
    return trees.get("params", {}), trees.get("batch_stats", {})


def port_into(target: SameNetwork, source: Network, table: Table = SAME_NAMES) -> SameNetwork:
    """Returns a network with the weights and statistics of another network, matched by name.

    The networks may belong to different libraries (linen, NNX or Equinox).

    Args:
        target: the network to fill, for instance an untrained one.
        source: a network with the same layers.
        table: maps each layer's path in `source` to its path in `target`. `table.flattened` lists
            the layers of `source` whose input consists of flattened images. This is used if exactly
            one of the networks is an Equinox network, because Equinox has channels first.

    Raises:
        UserError: if leaves are missing or unused, or shapes differ; the message lists the
            leaves.

    >>> from bnjax.clinic import linen
    >>> import flax.linen as nn
    >>> class Net(nn.Module):
    ...     name_of_layer: str
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         return nn.Dense(2, name=self.name_of_layer)(x.mean((1, 2)))
    >>> one, other = (
    ...     linen(Net(name), {name: {"kernel": np.full((3, 2), value), "bias": np.zeros(2)}}, {})
    ...     for name, value in (("head", 1.0), ("logits", 5.0))
    ... )
    >>> print(port_into(one, other, Table({"logits": "head"})).params["head"]["kernel"][0])
    [5. 5.]
    """
    # Only a network with channels last needs `flattened`, because torch has channels first.
    differ = source.per_example != target.per_example
    of_target = {str(table.name(one, "torch")): shape for one, shape in table.flattened.items()}
    leaving = table if differ and target.per_example else Table(table.names)
    arriving = Table(flattened=of_target) if differ and source.per_example else SAME_NAMES
    arrays = port_to("torch", source.params, source.batch_stats, leaving)
    like = target.params, target.batch_stats
    params, batch_stats = port_from("torch", arrays, like, arriving)
    return dataclasses.replace(target, params=params, batch_stats=batch_stats)


def read(file: Path) -> Arrays:
    """Reads a safetensors file as a dict of arrays keyed by name, without pickle.

    Raises:
        UserError: if the file is missing, damaged or in a different format.
    """
    if not file.is_file():
        raise UserError(f"there is no file {file}.")
    try:
        return safetensors.numpy.load_file(file)
    except (safetensors.SafetensorError, ValueError, TypeError, OSError) as error:
        raise UserError(
            f"{file} is not a safetensors file, or is damaged ({brief(error)}). Other formats may "
            "run code when they are read; bnjax port --help shows how to save safetensors."
        ) from error


def write(file: Path, arrays: Arrays) -> None:
    """Writes a dict of arrays keyed by name to a safetensors file.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # C order, because safetensors writes the raw memory and ignores strides.
        solid = {name: np.asarray(value, order="C") for name, value in arrays.items()}
        safetensors.numpy.save_file(solid, file, {"format": "pt"})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} cannot be written: {error}") from error


def _listed(title: str, lines: Iterable[str]) -> str:
    rows = [f"\n    {line}" for line in lines]
    return f"\n  {title}:{''.join(rows)}" if rows else ""
