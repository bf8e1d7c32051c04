"""Averages weights with an Optax transformation."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnjax.norms.running_average import blend, kept_fraction
from bnjax.types import Leaf

Kind = Literal["ema", "swa"]


class WeightAverageState(NamedTuple):
    """The state of a weight average.

    Attributes:
        updates: the number of weight updates, int32 [].
        averaged: the number of averaged iterates, int32 [].
        average: the averaged weights, float32 or wider; before update `start`, a copy of the
            weights.
    """

    updates: Leaf
    averaged: Leaf
    average: Any


def weight_average(
    tx: optax.GradientTransformation | None = None,
    *,
    kind: Kind = "ema",
    decay: float = 0.999,
    debias: bool = True,
    start: int = 1,
    every: int = 1,
) -> optax.GradientTransformation:
    """Returns an optimizer that also averages the weights; the updates are unchanged.

    The weights may be any pytree, such as linen parameters or an Equinox module.

    Let p(t) be the weights after update t. The averaged iterates are p(start), p(start + every), …;
    after n of these iterates the average m is

        "ema": m = d m + (1 - d) p with decay d (Polyak & Juditsky, 1992; Tarvainen & Valpola, 2017)
        "swa": the mean of all n (Izmailov et al., 2018)

    `debias` removes the initial value from an EMA: the coefficients of all p are scaled to a sum
    of 1, so the first average equals the first p. Without `debias`, m starts from the
    weights before update `start`. Read the average with `averaged_params`.

    Args:
        tx: the optimizer; None if the result becomes the last element of an `optax.chain`. No later
            transformation may change the updates.
        kind: the kind of average.
        decay: the fraction of the old EMA that an update keeps, in [0, 1).
        debias: whether to debias an "ema", as above.
        start: the number of the first update whose weights are averaged, 1 or above.
        every: the number of updates from one averaged iterate to the next, 1 or above.

    Raises:
        ValueError: if an argument is invalid.

    >>> tx = weight_average(optax.sgd(1.0), kind="swa")
    >>> params = {"w": jnp.array(0.0)}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update({"w": jnp.array(-1.0)}, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> print(params["w"], averaged_params(state, params)["w"])  # the mean of 1, 2 and 3
    3.0 2.0
    """
    if kind not in ("ema", "swa") or not 0 <= decay < 1 or start < 1 or every < 1:
        raise ValueError(
            f"kind = {kind!r}, decay = {decay}, start = {start}, every = {every} is invalid: "
            "kind must be 'ema' or 'swa', 0 <= decay < 1, start >= 1, every >= 1."
        )

    def init(params: Any) -> WeightAverageState:
        # A copy, because a step may donate the buffers of the weights.
        average = jax.tree.map(
            lambda leaf: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True),
            params,
        )
        return WeightAverageState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), average)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight_average needs update(updates, state, params)")
        number = state.updates + 1
        counts = (number >= start) & ((number - start) % every == 0)
        kept = kept_fraction(
            None if kind == "swa" else decay, kind == "ema" and debias, state.averaged
        )
        # Before update `start` the average equals the weights (kept = 0).
        kept = jnp.where(counts, kept, jnp.where(number < start, 0.0, 1.0))
        average = jax.tree.map(
            lambda old, new: blend(old, new.astype(old.dtype), kept.astype(old.dtype)),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, WeightAverageState(number, state.averaged + counts, average)

    average = optax.GradientTransformation(init, update)
    return average if tx is None else optax.chain(tx, average)


def averaged_params(opt_state: optax.OptState, params: Any) -> Any:
    """Returns the averaged weights from an optimizer's state.

    Both arguments may have additional leading axes from `jax.vmap` or `jax.pmap`.

    Args:
        opt_state: the state of an optimizer with exactly one `weight_average`, at any depth.
        params: the weights. They define the dtypes of the result, and the values of masked leaves.

    Raises:
        ValueError: if the state does not have exactly one average.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, WeightAverageState))
    found = [node for node in nodes if isinstance(node, WeightAverageState)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state has {len(found)} weight averages, not one. Wrap the "
            "optimizer in bnjax.clinic.averaging.weight_average exactly once."
        )
    return jax.tree.map(
        lambda leaf, like: like if isinstance(leaf, optax.MaskedNode) else leaf.astype(like.dtype),
        found[0].average,
        params,
        is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode),  # a frozen parameter
    )
