"""Type aliases for arrays and trees of arrays; functions that name and fingerprint the leaves."""

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Integer, Shaped

Array = jax.Array | np.ndarray
Images = Shaped[Array, "n h w c"]  # uint8, or float
Labels = Integer[Array, " n"]
Shares = Float[Array, "n classes"]  # class probabilities of mixed labels; each row sums to 1
Mask = Bool[Array, " n"]  # False marks padding
Logits = Float[Array, "n classes"]
Losses = Float[Array, " n"]

# A leaf of a tree: an array, or its shape or sharding in a tree with the same structure.
Leaf = Any
# A tree of arrays with string keys, such as a variable collection of `flax.linen`.
Tree = Mapping[str, Any]
# The trainable weights, the collection "params" of a linen module.
Params = Tree
# The running statistics, the collection "batch_stats" of a linen module; may be empty.
BatchStats = Tree
# A dict of `image` (Images), `label` (Labels or Shares) and optionally `mask` (Mask).
Batch = Mapping[str, Array]


def named_leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Returns the leaves of a tree, keyed by dotted name, in the order of the tree.

    >>> named_leaves({"dense": {"kernel": 1, "bias": 2}, "steps": (3, 4)})
    {'dense.kernel': 1, 'dense.bias': 2, 'steps.0': 3, 'steps.1': 4}
    """
    if isinstance(tree, Mapping):
        branches: Any = tree.items()
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        branches = zip(tree._fields, tree, strict=True)
    elif isinstance(tree, tuple | list):
        branches = enumerate(tree)
    else:
        return {} if tree is None else {path: tree}
    prefix = f"{path}." if path else ""
    found: dict[str, Any] = {}
    for name, branch in branches:
        found |= named_leaves(branch, f"{prefix}{name}")
    return found


def fingerprint(tree: Any) -> str:
    """Returns a CRC-32 checksum of the leaves of a tree with their names, shapes and dtypes.

    The checksum is the same on every machine, and saving and restoring do not change it. Computing
    it takes 0.1 s for 100 MB.

    >>> fingerprint({"w": np.ones(2, np.float32)})
    'feecbf85'
    """
    checksum = 0
    for name, leaf in sorted(named_leaves(tree).items()):
        array = np.ascontiguousarray(leaf)
        about = f"{name} {array.dtype} {array.shape}".encode()
        checksum = zlib.crc32(array.reshape(-1).view(np.uint8).data, zlib.crc32(about, checksum))
    return f"{checksum:08x}"
