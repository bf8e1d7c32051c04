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


@pytest.mark.parametrize(
    ("decay", "start", "every"),
    [
        *((1.0, start, every) for start, every in ((1, 1), (2, 3), (STEPS + 5, 1))),
        *((0.0, 1, 1), (0.9, 2, 3), (0.9999, 1, 1)),
    ],
)
def test_an_average_is_a_weighted_mean_of_the_chosen_weights(decay, start, every):
    """With the same weight for all in SWA, and without the initial value in an EMA."""
    options = {"kind": "swa"} if decay == 1 else {"decay": decay}
    found = averages(**options, start=start, every=every)
    for t in range(1, STEPS + 1):
        those = np.arange(start, t + 1, every) if t >= start else np.array([t])
        wanted = np.average(WEIGHTS[those], weights=decay ** np.arange(len(those))[::-1])
        np.testing.assert_allclose(found[t - 1], wanted, rtol=1e-5)


@pytest.mark.parametrize("start", [1, 4])
def test_an_ema_with_its_beginning_starts_at_the_weights_before(start):
    found = averages(decay=0.9, debias=False, start=start)
    wanted = WEIGHTS[0]
    for t in range(1, STEPS + 1):
        wanted = WEIGHTS[t] if t < start else 0.9 * wanted + 0.1 * WEIGHTS[t]
        np.testing.assert_allclose(found[t - 1], wanted, rtol=1e-6)


def test_at_the_end_of_a_chain_and_inside_other_transformations():
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.array([3.0, 4.0])}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.5), weight_average(kind="swa"))
    tx = optax.inject_hyperparams(lambda unused: inner)(unused=0.0)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    for found in (updates, averaged_params(state, params)):
        np.testing.assert_allclose(found["w"], [-0.3, -0.4], rtol=1e-6)


def test_averages_of_bfloat16_weights_are_float32():
    tx, params = weight_average(optax.sgd(1.0), decay=0.999), {"w": jnp.ones(2, jnp.bfloat16)}
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update({"w": jnp.full(2, -1.0, jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
    found = state[-1].average["w"]
    assert found.dtype == tx.init(params)[-1].average["w"].dtype == jnp.float32
    wanted = np.average([2, 3, 4], weights=0.999 ** np.arange(3)[::-1])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
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
    for _ in range(2)
]


def trained(batches):
    """Returns the state of the average after some steps, and the weights after each."""
    tx = weight_average(optax.sgd(0.1), kind="swa")
    init = jax.jit(functools.partial(init_state, MODEL, tx))
    state, stats = init(jax.random.key(0), BATCHES[0]["image"])
    step = jax.jit(functools.partial(train_step, model=MODEL, tx=tx, skip_nonfinite=True))
    weights = []
    for batch in batches:
        state, stats, _ = step(state, stats, batch)
        weights.append(state.params)
    (average,) = (of for of in state.opt_state if isinstance(of, WeightAverageState))
    return average, weights


def test_a_skipped_step_leaves_the_average_alone():
    bad = BATCHES[0] | {"image": np.full_like(BATCHES[0]["image"], np.inf)}
    average, _ = trained([BATCHES[0], bad, BATCHES[1]])
    wanted, weights = trained(BATCHES)
    assert int(average.averaged) == int(average.updates) == 2
    # Dropout there is none, so that the numbers of the steps make no difference.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, average.average, wanted.average)
    jax.tree.map(close, average.average, jax.tree.map(lambda *of: np.mean(of, 0), *weights))
