"""Histograms against NumPy, and against a network and its gradients written out by hand."""

import functools
import json
from collections import OrderedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.train.diagnostics import BINS, MAX_VALUES, QUANTILES, sample, summarise
from bnjax.train_step import init_state


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5, name="zebra")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=True)(nn.relu(x))
        return nn.Dense(3, name="apple")(x)


IMAGES = np.random.default_rng(0).uniform(size=(7, 2, 2, 1)).astype(np.float32)
LABELS = np.arange(7, dtype=np.int32) % 3


def by_hand(params, x):
    """Returns the outputs of all layers of the network above."""
    zebra = (
        jnp.dot(x.reshape(len(x), -1), params["zebra"]["kernel"]) + params["zebra"]["bias"][None]
    )
    centred = zebra - zebra.mean(0, keepdims=True)
    norm = centred / jnp.sqrt((centred**2).mean(0, keepdims=True) + 1e-5)
    norm = norm * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    apple = jnp.dot(jnp.maximum(norm, 0), params["apple"]["kernel"]) + params["apple"]["bias"][None]
    return OrderedDict(zebra=zebra, norm=norm, apple=apple)


@pytest.fixture(scope="module")
def found():
    state, batch_stats = jax.jit(functools.partial(init_state, Net(), optax.sgd(0.1)))(
        jax.random.key(0), IMAGES
    )
    samples = jax.jit(functools.partial(sample, model=Net()))(
        state, batch_stats, {"image": IMAGES, "label": LABELS}
    )
    return state, batch_stats, jax.device_get(samples)


def test_activations_are_those_of_the_layers_in_their_order(found):
    state, _, samples = found
    wanted = by_hand(state.params, IMAGES)
    assert list(samples["activation"]) == list(wanted) == ["zebra", "norm", "apple"]
    for name, values in wanted.items():
        np.testing.assert_allclose(
            np.sort(samples["activation"][name]), np.sort(values.reshape(-1)), rtol=1e-4, atol=1e-5
        )


def test_gradients_are_those_of_the_mean_loss(found):
    state, _, samples = found

    def loss(params):
        logits = by_hand(params, IMAGES)["apple"]
        return (jax.nn.logsumexp(logits, -1) - logits[jnp.arange(7), LABELS]).mean()

    grads = jax.grad(loss)(state.params)
    assert [name.partition(".")[0] for name in samples["gradient"]] == [
        "zebra",
        "zebra",
        "norm",
        "norm",
        "apple",
        "apple",
    ]
    largest = max(
        np.abs(leaf).max() for leaf in jax.tree.leaves(grads)
    )  # zebra's bias has none, but for the rounding of what cancels
    for name, values in samples["gradient"].items():
        layer, _, leaf = name.partition(".")
        np.testing.assert_allclose(
            np.sort(values), np.sort(grads[layer][leaf].reshape(-1)), rtol=1e-3, atol=1e-5 * largest
        )


def test_statistics_are_the_running_ones_and_stay(found):
    _, batch_stats, samples = found
    assert list(samples["statistic"]) == ["norm.mean", "norm.var"]
    np.testing.assert_array_equal(samples["statistic"]["norm.var"], batch_stats["norm"]["var"])


def test_of_a_large_array_all_channels_are_sampled():
    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(30, name="wide", bias_init=lambda key, shape, dtype: jnp.arange(30.0))(
                x.mean((1, 2)) * 0
            )

    images = np.zeros(
        (8192, 1, 1, 3), np.float32
    )  # 245,760 outputs: every fourth would be of even channels only
    state, batch_stats = init_state(Wide(), optax.sgd(0.1), jax.random.key(0), images[:1])
    values = sample(
        state, batch_stats, {"image": images, "label": np.zeros(8192, np.int32)}, model=Wide()
    )["activation"]["wide"]
    assert MAX_VALUES / 2 < values.size <= MAX_VALUES
    counts = np.bincount(np.asarray(values, int), minlength=30)
    assert counts.min() > 0.99 * counts.max()


def test_summaries_are_what_numpy_says():
    values = np.random.default_rng(0).standard_t(2, 5000)
    numbers = summarise(OrderedDict(activation=OrderedDict(a=values)))["activation"]["a"]
    np.testing.assert_allclose(numbers["quantiles"], np.quantile(values, QUANTILES), rtol=1e-5)
    assert (numbers["low"], numbers["high"]) == (numbers["quantiles"][1], numbers["quantiles"][-2])
    within = (values >= numbers["low"]) & (values <= numbers["high"])
    counts, _ = np.histogram(values[within], BINS, (numbers["low"], numbers["high"]))
    counts[0] += (values < numbers["low"]).sum()
    counts[-1] += (values > numbers["high"]).sum()
    assert numbers["counts"] == counts.tolist()


@pytest.mark.parametrize(
    "values", [[3.0], [1e30, 1e30], [-2.0, np.nan, np.inf], [1.0, 1.0 + 1e-9], [1e-45, 0.0]]
)
def test_summaries_of_strange_values_are_finite_and_fit_for_json(values):
    numbers = summarise(OrderedDict(gradient=OrderedDict(a=np.array(values))))["gradient"]["a"]
    assert numbers["low"] < numbers["high"]
    assert sum(numbers["counts"]) == np.isfinite(values).sum()
    json.dumps(numbers, allow_nan=False)


def test_what_has_no_finite_value_is_left_out():
    assert summarise(OrderedDict(gradient=OrderedDict(a=np.array([np.nan]), b=np.zeros(0)))) == {
        "gradient": {}
    }
