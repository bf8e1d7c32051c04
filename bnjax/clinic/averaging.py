"""Averages of weights, and their statistics."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnjax.norms.moments import blend, kept_fraction
from bnjax.types import Leaf, Params

Kind = Literal["ema", "swa"]


class WeightAverageState(NamedTuple):
    """An average of weights.

    Attributes:
        updates: the number of updates of the weights, int32 [].
        averaged: the number of weights in the average, int32 [].
        average: float32 or wider; the weights themselves as long as nothing was averaged.
    """

    updates: Leaf
    averaged: Leaf
    average: Params


def weight_average(
    tx: optax.GradientTransformation | None = None,
    *,
    kind: Kind = "ema",
    decay: float = 0.999,
    debias: bool = True,
    start: int = 1,
    every: int = 1,
) -> optax.GradientTransformation:
    """Returns an optimizer whose state also holds an average of the weights; updates are as before.

    With p(t) the weights after update t, the weights at t = start, start + every, … are averaged.
    After the n-th of them the average is

        "ema": m = d m + (1 - d) p, d the decay (Polyak & Juditsky, 1992; Tarvainen & Valpola, 2017)
        "swa": the mean of all n (Izmailov et al., 2018)

    `debias` leaves out the value that an EMA starts from: the factors of the p, powers of d, are
    scaled to the sum 1, so the first average is the first p. Without it m starts from the weights
    before update `start`. Read it with `averaged_params`.

    Args:
        tx: the optimizer; None: nothing, for the end of an `optax.chain`. Every transformation that
            changes updates has to come before.
        kind: which average.
        decay: the fraction of an EMA that is kept, 0 up to but not including 1.
        debias: see above; for "ema".
        start: the first update whose weights count, 1 or above.
        every: the distance between two updates that count, 1 or above.

    Raises:
        ValueError: for an impossible argument.

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

    def init(params: Params) -> WeightAverageState:
        # A copy: the weights' own buffers may be donated to a step.
        average = jax.tree.map(
            lambda leaf: jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True),
            params,
        )
        return WeightAverageState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), average)

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight_average needs update(updates, state, params)")
        number = state.updates + 1
        counts = (number >= start) & ((number - start) % every == 0)
        kept = kept_fraction(
            None if kind == "swa" else decay, kind == "ema" and debias, state.averaged
        )
        # Nothing is averaged before `start`: the average is the weights, kept 0.
        kept = jnp.where(counts, kept, jnp.where(number < start, 0.0, 1.0))
        average = jax.tree.map(
            lambda old, new: blend(old, new.astype(old.dtype), kept.astype(old.dtype)),
            state.average,
            optax.apply_updates(params, updates),
        )
        return updates, WeightAverageState(number, state.averaged + counts, average)

    average = optax.GradientTransformation(init, update)
    return average if tx is None else optax.chain(tx, average)


def averaged_params(opt_state: optax.OptState, params: Params) -> Params:
    """Returns the averaged weights in an optimizer's state.

    Under `jax.vmap` or `jax.pmap`, with whatever further axes both have.

    Args:
        opt_state: of an optimizer with one `weight_average` in it, however deep.
        params: the weights; they give the dtypes.

    Raises:
        ValueError: if there is not exactly one.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, WeightAverageState))
    found = [node for node in nodes if isinstance(node, WeightAverageState)]
    if len(found) != 1:
        raise ValueError(
            f"the optimizer's state holds {len(found)} averages of the weights, not one. Wrap the "
            "optimizer in bnjax.clinic.averaging.weight_average, once."
        )
    return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), found[0].average, params)
