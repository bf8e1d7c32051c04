"""What differs between the versions of JAX that bnjax runs on, found by what is there, never by a version number."""

from typing import Any

import jax
import jax.experimental

_jax: Any = jax  # for mypy, which knows the names of one version only

enable_x64 = _jax.enable_x64 if hasattr(jax, "enable_x64") else _jax.experimental.enable_x64


def varying(leaf: Any, axis: str) -> jax.Array:
    """Returns the value marked as different on each shard of a manual axis of `jax.shard_map`.

    Raises:
        ValueError: if it is marked already.
    """
    if hasattr(jax.lax, "pcast"):
        return _jax.lax.pcast(leaf, axis, to="varying")
    return _jax.lax.pvary(leaf, axis)
