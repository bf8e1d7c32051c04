"""Averages of the weights against closed forms, in every wrapper, and when a step is skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from foreign import NETWORKS

from bnjax.clinic.averaging import WeightAverageState, averaged_params, weight_average
from bnjax.train_step import init_state, train_step

STEPS = 9
# After update t of plain gradient descent at rate 1 with gradient -t the weights are 1 + 2 + … + t.
WEIGHTS = 5.0 + np.cumsum(np.arange(STEPS + 1.0))  # from before the first update on


def averages(**options):
    """Returns the average after each update of the weights above, as it is read."""
    tx, params, found = weight_average(optax.sgd(1.0), **options), {"a": jnp.full(3, 5.0)}, []
    state = tx.init(params)
    for step in range(1, STEPS + 1):
        updates, state = jax.jit(tx.update)({"a": jnp.full(3, -1.0 * step)}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["a"], WEIGHTS[step])
        found.append(float(averaged_params(state, params)["a"][1]))
    return found


def chosen(start, every, until):
    """The numbers of the updates that count, up to one of them."""
    return [t for t in range(1, until + 1) if t >= start and (t - start) % every == 0]


@pytest.mark.parametrize(("start", "every"), [(1, 1), (2, 3), (STEPS + 5, 1)])
def test_swa_is_the_mean_of_the_chosen_weights(start, every):
    found = averages(kind="swa", start=start, every=every)
    for t in range(1, STEPS + 1):
        those = chosen(start, every, t) or [t]  # the weights themselves before the first
        np.testing.assert_allclose(found[t - 1], np.mean(WEIGHTS[those]), rtol=1e-6)


@pytest.mark.parametrize(("decay", "start", "every"), [(0.0, 1, 1), (0.9, 2, 3), (0.9999, 1, 1)])
def test_an_ema_without_its_beginning_is_a_weighted_mean(decay, start, every):
    found = averages(decay=decay, start=start, every=every)
    for t in range(1, STEPS + 1):
        those = chosen(start, every, t) or [t]
        powers = float(decay) ** np.arange(len(those))[::-1]
        wanted = np.average(WEIGHTS[those], weights=powers)
        np.testing.assert_allclose(found[t - 1], wanted, rtol=1e-5)


@pytest.mark.parametrize("start", [1, 4])
def test_an_ema_with_its_beginning_starts_at_the_weights_before(start):
    found = averages(decay=0.9, debias=False, start=start)
    wanted = WEIGHTS[0]
    for t in range(1, STEPS + 1):
        wanted = WEIGHTS[t] if t < start else 0.9 * wanted + 0.1 * WEIGHTS[t]
        np.testing.assert_allclose(found[t - 1], wanted, rtol=1e-6)


def test_at_the_end_of_a_chain_and_inside_other_transformations():
    params = {"w": jnp.zeros(2)}
    grads = {"w": jnp.array([3.0, 4.0])}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5), weight_average(kind="swa"))
    tx = optax.inject_hyperparams(lambda unused: inner)(unused=0.0)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [-0.3, -0.4], rtol=1e-6)
    np.testing.assert_allclose(averaged_params(state, params)["w"], [-0.3, -0.4], rtol=1e-6)


def test_averages_of_bfloat16_weights_are_float32():
    params = {"w": jnp.ones(2, jnp.bfloat16)}
    tx = weight_average(optax.sgd(1.0), decay=0.999)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": jnp.full(2, -1.0, jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
    assert state[-1].average["w"].dtype == jnp.float32
    powers = 0.999 ** np.arange(3)[::-1]
    np.testing.assert_allclose(
        state[-1].average["w"], np.average([2, 3, 4], weights=powers), rtol=1e-5
    )
    assert averaged_params(state, params)["w"].dtype == jnp.bfloat16


def test_what_is_impossible_is_refused():
    for options in ({"decay": 1.0}, {"start": 0}, {"every": 0}):
        with pytest.raises(ValueError, match="is invalid"):
            weight_average(**options)
    tx = weight_average()
    with pytest.raises(ValueError, match="needs update"):
        tx.update({}, tx.init({}))
    params = {"w": jnp.zeros(1)}
    for tx in (optax.adam(0.1), weight_average(weight_average(optax.sgd(0.1)))):
        with pytest.raises(ValueError, match="not one"):
            averaged_params(tx.init(params), params)


MODEL = NETWORKS["remat"]
RNG = np.random.default_rng(0)
BATCHES = [
    {"image": RNG.random((16, 4, 4, 3), np.float32), "label": np.arange(16, dtype=np.int32) % 10}
    for _ in range(3)
]


def trained(key, batches, tx, **options):
    """Returns the state after some steps, and the weights after each."""
    init = jax.jit(functools.partial(init_state, MODEL, tx))
    state, stats = init(key, BATCHES[0]["image"])
    step = jax.jit(functools.partial(train_step, model=MODEL, tx=tx, **options))
    weights = []
    for batch in batches:
        state, stats, _ = step(state, stats, batch)
        weights.append(state.params)
    return state, weights


def assert_close(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_skipped_step_leaves_the_average_alone():
    bad = BATCHES[0] | {"image": np.full_like(BATCHES[0]["image"], np.inf)}
    tx = weight_average(optax.sgd(0.1), kind="swa")
    state, _ = trained(jax.random.key(0), [BATCHES[0], bad, BATCHES[1]], tx, skip_nonfinite=True)
    wanted, weights = trained(jax.random.key(0), BATCHES[:2], tx)
    (average,) = (s for s in state.opt_state if isinstance(s, WeightAverageState))
    assert int(average.averaged) == int(average.updates) == 2
    # Dropout there is none, so that the numbers of the steps make no difference.
    assert_close(average.average, averaged_params(wanted.opt_state, wanted.params))
    assert_close(average.average, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *weights))
