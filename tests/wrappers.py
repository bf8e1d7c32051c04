"""One function under every wrapper: on one device, and over eight simulated ones."""

from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "devices"
DEVICES = 8
MAPPED = ("pmap", "shard_map", "shard_map without check", "vmap")
WRAPPERS = ("jit with shardings", *MAPPED)


def run(wrapper, make, replicated, sharded):
    """Runs make(axis_name)(replicated, sharded) -> (replicated, sharded), and returns both as they would come from one device.

    Args:
        wrapper: "one device" or one of WRAPPERS.
        make: takes the axis name, or None where there is none.
        replicated: a tree of arrays, the same on every device.
        sharded: a tree of arrays whose first axis is divided up.
    """
    if wrapper == "one device":
        return jax.device_get(jax.jit(make(None))(replicated, sharded))
    if wrapper == "jit with shardings":
        sharded = jax.device_put(sharded, NamedSharding(_mesh(), PartitionSpec(AXIS)))
        replicated = jax.device_put(replicated, NamedSharding(_mesh(), PartitionSpec()))
        return jax.device_get(jax.jit(make(None))(replicated, sharded))
    if wrapper.startswith("shard_map"):
        specs = PartitionSpec(), PartitionSpec(AXIS)
        check = wrapper == "shard_map"
        mapped = jax.shard_map(make(AXIS), mesh=_mesh(), in_specs=specs, out_specs=specs, check_vma=check)
        return jax.device_get(jax.jit(mapped)(replicated, sharded))
    mapping = partial(jax.pmap if wrapper == "pmap" else jax.vmap, axis_name=AXIS, in_axes=(None, 0))
    sharded = jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), sharded)
    copies, shards = jax.device_get(mapping(make(AXIS))(replicated, sharded))
    for copy in jax.tree.leaves(copies):
        np.testing.assert_array_equal(copy, np.broadcast_to(copy[:1], copy.shape))
    return jax.tree.map(lambda leaf: leaf[0], copies), jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), shards)


def _mesh():
    return jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))
