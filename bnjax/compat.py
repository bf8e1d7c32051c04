"""Hides differences between JAX versions by testing for features, not for version numbers."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp

_jax: Any = jax  # mypy checks names against one version of JAX

enable_x64 = _jax.enable_x64 if hasattr(jax, "enable_x64") else _jax.experimental.enable_x64


def varying(tree: Any, axis_name: str | tuple[str, ...] | None) -> Any:
    """Marks values as varying across shards, so that `jax.grad` does not sum over the axis.

    With the vma check of `jax.shard_map`, the gradient of a replicated value is summed over the
    shards; a second, explicit sum would make the gradient n times too large. The axes of `jax.pmap`
    and `jax.vmap` need no such mark.
    """
    if axis_name is None:
        return tree
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)
    manual = sorted(names & set(jax.sharding.get_abstract_mesh().manual_axes))

    def mark(leaf: jax.Array) -> jax.Array:
        for name in manual:
            with contextlib.suppress(ValueError):  # already varying
                if hasattr(jax.lax, "pcast"):
                    leaf = _jax.lax.pcast(leaf, name, to="varying")
                else:
                    leaf = _jax.lax.pvary(leaf, name)
        return leaf

    return jax.tree.map(mark, tree)


def vmap(function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
    """Returns the vmapped function, or a loop over calls if JAX lacks a batching rule.

    JAX 0.7 cannot vmap the gradient of a convolution in a multi-device program. Each entry of
    `in_axes` is 0 or None.
    """

    def call(*arguments: Any) -> Any:
        try:
            return jax.vmap(function, (*in_axes,))(*arguments)
        except NotImplementedError:
            mapped = [leaf for leaf, axis in zip(arguments, in_axes, strict=True) if axis == 0]
        found = [
            function(*(
                argument if axis is None else jax.tree.map(lambda leaf, i=i: leaf[i], argument)
                for argument, axis in zip(arguments, in_axes, strict=True)
            ))
            for i in range(jax.tree.leaves(mapped)[0].shape[0])
        ]  # fmt: skip
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    return call
