"""Weights and running statistics from PyTorch or Keras and to them, for networks of equal layers.

No number is changed here but for its dtype. What differs in meaning, momentum and the stored
variance, is in `bnjax.clinic.conventions`; files are in `bnjax.clinic.weights_file`.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.layouts import Entry, Framework, PortError, Table, entries, listed
from bnjax.train_step import forward
from bnjax.types import Array, BatchStats, Images, Params

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
