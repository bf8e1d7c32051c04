"""The types that the rest of bnjax speaks of: arrays and the trees made of them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
# A tree of arrays under string keys, as `flax.linen` keeps one collection of variables.
Tree = Mapping[str, Any]
# The trainable weights: the collection "params" of a linen module.
Params = Tree
# The running statistics: the collection "batch_stats" of a linen module; empty for a network without any.
BatchStats = Tree
# `image` [n, h, w, c] uint8 or float, `label` int [n], and optionally `mask` bool [n] where False marks padding.
Batch = Mapping[str, Array]
