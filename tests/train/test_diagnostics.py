"""Samples against a network and its gradients written out by hand; the first bad layer."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.train.diagnostics import (
    BINS,
    MAX_VALUES,
    QUANTILES,
    first_nonfinite,
    sample,
    summarise,
)
from bnjax.train_step import init_state


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5, name="zebra")(x.reshape(x.shape[0], -1))
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=True)(nn.relu(x))
        return nn.Dense(3, name="apple")(x)


IMAGES = np.random.default_rng(0).uniform(size=(7, 2, 2, 1)).astype(np.float32)
BATCH = {"image": IMAGES, "label": np.arange(7, dtype=np.int32) % 3}


def by_hand(params, x):
    """Returns the outputs of all layers of the network above."""
    zebra = x.reshape(len(x), -1) @ params["zebra"]["kernel"] + params["zebra"]["bias"][None]
    centred = zebra - zebra.mean(0, keepdims=True)
    norm = centred / jnp.sqrt((centred**2).mean(0, keepdims=True) + 1e-5)
    norm = norm * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    apple = jnp.maximum(norm, 0) @ params["apple"]["kernel"] + params["apple"]["bias"][None]
    return {"zebra": zebra, "norm": norm, "apple": apple}


@pytest.fixture(scope="module")
def start():
    init = jax.jit(functools.partial(init_state, Net(), optax.sgd(0.1)))
    return init(jax.random.key(0), IMAGES)


@pytest.fixture(scope="module")
def samples(start):
    return jax.device_get(jax.jit(functools.partial(sample, model=Net()))(*start, BATCH))


def test_samples_are_outputs_gradients_and_statistics_in_the_order_of_the_layers(start, samples):
    state, batch_stats = start
    wanted = jax.jit(by_hand)(state.params, IMAGES)
    assert list(samples["activation"]) == ["zebra", "norm", "apple"]
    for name, values in samples["activation"].items():
        np.testing.assert_allclose(values, wanted[name].reshape(-1), rtol=1e-4, atol=1e-5)

    def loss(params):
        logits = by_hand(params, IMAGES)["apple"]
        return (jax.nn.logsumexp(logits, -1) - logits[jnp.arange(7), BATCH["label"]]).mean()

    grads = jax.jit(jax.grad(loss))(state.params)
    layers = [name.partition(".")[0] for name in samples["gradient"]]
    assert layers == ["zebra", "zebra", "norm", "norm", "apple", "apple"]
    # zebra's bias has none, but for the rounding of what cancels.
    bound = 1e-5 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for name, values in samples["gradient"].items():
        layer, _, leaf = name.partition(".")
        np.testing.assert_allclose(values, grads[layer][leaf].reshape(-1), rtol=1e-3, atol=bound)
    assert list(samples["statistic"]) == ["norm.mean", "norm.var"]
    np.testing.assert_array_equal(samples["statistic"]["norm.var"], batch_stats["norm"]["var"])


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        bias = self.param("bias", lambda key: jnp.arange(30.0))
        return jnp.zeros((x.shape[0], 30)) + bias[None]


def test_of_a_large_array_all_channels_are_sampled():
    # 245,760 outputs: every fourth would be of even channels only.
    batch = {"image": np.zeros((8192, 1, 1, 3), np.float32), "label": np.zeros(8192, np.int32)}
    start = init_state(Wide(), optax.sgd(0.1), jax.random.key(0), batch["image"][:1])
    values = jax.jit(functools.partial(sample, model=Wide()))(*start, batch)["activation"]["output"]
    assert MAX_VALUES / 2 < values.size <= MAX_VALUES
    counts = np.bincount(np.asarray(values, int), minlength=30)
    assert counts.min() > 0.99 * counts.max()


def test_summaries_are_what_numpy_says():
    values = np.random.default_rng(0).standard_t(2, 5000)
    numbers = summarise({"activation": {"a": values}})["activation"]["a"]
    np.testing.assert_allclose(numbers["quantiles"], np.quantile(values, QUANTILES), rtol=1e-5)
    low, high = numbers["low"], numbers["high"]
    assert [low, high] == [numbers["quantiles"][1], numbers["quantiles"][-2]]
    counts, _ = np.histogram(values[(values >= low) & (values <= high)], BINS, (low, high))
    counts[0] += (values < low).sum()
    counts[-1] += (values > high).sum()
    assert numbers["counts"] == counts.tolist()


@pytest.mark.parametrize(
    "values", [[3.0], [1e30, 1e30], [-2.0, np.nan, np.inf], [1.0, 1.0 + 1e-9], [1e-45, 0.0]]
)
def test_summaries_of_strange_values_are_finite_and_fit_for_json(values):
    groups = {"a": np.array(values), "b": np.array([np.nan]), "c": np.zeros(0)}
    summary = summarise({"gradient": groups})["gradient"]
    assert [*summary] == ["a"]
    assert summary["a"]["low"] < summary["a"]["high"]
    assert sum(summary["a"]["counts"]) == np.isfinite(values).sum()
    json.dumps(summary, allow_nan=False)


def filled(tree, path, value):
    """Returns a copy of a tree in which a leaf is filled with a value."""
    layer, leaf = path.split(".")
    return tree | {layer: tree[layer] | {leaf: np.full_like(tree[layer][leaf], value)}}


def infinite(logits, label):
    return logits.sum(-1) * np.float32(np.inf)


def steep(logits, label):
    return jnp.sqrt(logits.sum(-1) * 0)


PADDED = {"image": np.concatenate([IMAGES[:6], np.full_like(IMAGES[6:], np.nan)])}
PADDED |= {"mask": np.arange(7) < 6, "label": np.array([*BATCH["label"][:6], 99], np.int32)}


@pytest.mark.parametrize(
    ("named", "params", "stats", "change"),
    [
        (None, (), (), {}),
        (None, (), (), {"batch": BATCH | PADDED}),
        ("the image values", (), (), {"batch": BATCH | {"image": IMAGES + np.float32(np.inf)}}),
        ("the parameter zebra.kernel", ("zebra.kernel", np.nan), (), {}),
        ("the running statistic norm.var", (), ("norm.var", np.inf), {}),
        ("the output of layer zebra", ("zebra.kernel", 3e38), (), {}),
        ("the output of layer apple", ("apple.kernel", 3e38), (), {}),
        ("the losses", (), (), {"loss_fn": infinite}),
        ("the gradient of apple.bias", (), (), {"loss_fn": steep}),
    ],
)
def test_what_is_not_finite_first_is_named(start, named, params, stats, change):
    state, batch_stats = start
    state = state.replace(params=filled(state.params, *params)) if params else state
    batch_stats = filled(batch_stats, *stats) if stats else batch_stats
    options = {"batch": BATCH, "model": Net()} | change
    assert first_nonfinite(state, batch_stats, **options) == named
