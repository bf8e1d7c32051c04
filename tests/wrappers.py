"""One function under every wrapper: on one device, and over eight simulated ones."""

from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

AXIS = "devices"
DEVICES = 8
MAPPED = ("pmap", "shard_map", "shard_map without check", "vmap")
WRAPPERS = ("jit with shardings", *MAPPED)


def close(mine, its, rtol=1e-4):
    """Compares two tuples of trees: each number to `rtol` of itself or 1e-5 of its tree's largest.

    What cancels in a sum leaves the roundings of its terms.
    """
    for one, other in zip(mine, its, strict=True):
        atol = 1e-5 * max((np.abs(leaf).max() for leaf in jax.tree.leaves(other)), default=0)
        check = partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
        jax.tree.map(check, one, other)


def run(wrapper, make, replicated, sharded):
    """Calls `wrap(wrapper, make)` once."""
    return wrap(wrapper, make)(replicated, sharded)


def wrap(wrapper, make):
    """Returns make(axis_name) under a wrapper: (replicated, sharded) -> (replicated, sharded).

    The results are as they would be on one device.

    Args:
        wrapper: "one device" or one of WRAPPERS.
        make: takes the axis name, or None where there is none; returns a function of two trees of
            arrays, of which the first is the same on every device and the second is divided up
            along the first axis.
    """
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))
    specs = PartitionSpec(), PartitionSpec(AXIS)
    if wrapper == "one device":
        compiled = jax.jit(make(None))
    elif wrapper == "jit with shardings":
        compiled = jax.jit(
            make(None), in_shardings=tuple(NamedSharding(mesh, one) for one in specs)
        )
    elif wrapper.startswith("shard_map"):
        options = {"mesh": mesh, "check_vma": wrapper == "shard_map"}
        compiled = jax.jit(jax.shard_map(make(AXIS), in_specs=specs, out_specs=specs, **options))
    else:
        mapping = jax.pmap if wrapper == "pmap" else jax.vmap
        mapped = mapping(make(AXIS), axis_name=AXIS, in_axes=(None, 0))
        return partial(_call_on_shards, jax.jit(mapped) if wrapper == "vmap" else mapped)
    return lambda replicated, sharded: jax.device_get(compiled(replicated, sharded))


def _call_on_shards(mapped, replicated, sharded):
    sharded = jax.tree.map(lambda leaf: leaf.reshape(DEVICES, -1, *leaf.shape[1:]), sharded)
    copies, shards = jax.device_get(mapped(replicated, sharded))
    for copy in jax.tree.leaves(copies):
        np.testing.assert_array_equal(copy, np.broadcast_to(copy[:1], copy.shape))
    first = jax.tree.map(lambda leaf: leaf[0], copies)
    return first, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), shards)
