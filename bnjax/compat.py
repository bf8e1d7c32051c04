"""What differs between versions of JAX, told by what is there, never by a number."""

import contextlib
from typing import Any

import jax
import jax.experimental

_jax: Any = jax  # for mypy, which knows the names of one version only

enable_x64 = _jax.enable_x64 if hasattr(jax, "enable_x64") else _jax.experimental.enable_x64


def varying(tree: Any, axis_name: str | tuple[str, ...] | None) -> Any:
    """Marks values as different on each shard, so that `jax.grad` sums over no axis by itself.

    With its vma check, `jax.shard_map` differentiates a replicated value into the sum over the
    shards; an explicit sum would then come second, and the gradients out n times too large. An
    axis of `jax.pmap` or `jax.vmap` needs no mark and takes none.
    """
    if axis_name is None:
        return tree
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    manual = sorted(names & set(jax.sharding.get_abstract_mesh().manual_axes))

    def mark(leaf: jax.Array) -> jax.Array:
        for name in manual:
            with contextlib.suppress(ValueError):  # it is varying already
                if hasattr(jax.lax, "pcast"):
                    leaf = _jax.lax.pcast(leaf, name, to="varying")
                else:
                    leaf = _jax.lax.pvary(leaf, name)
        return leaf

    return jax.tree.map(mark, tree)
