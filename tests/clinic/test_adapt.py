"""Adaptation without labels, against the formulas in NumPy's float64."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from bnjax.clinic.adaptation import affine_only, tent, tent_step
from bnjax.clinic.linen import linen
from bnjax.clinic.statistics import precise
from bnjax.train_step import init_variables

RNG = np.random.default_rng(0)
EPSILON = 1e-5


class Net(nn.Module):
    """Norm, dense, norm, logits, on vectors."""

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.5)
        x = norm(name="norm0")(x.reshape(len(x), -1))
        x = norm(name="norm1")(nn.Dense(3, name="dense")(x))
        return nn.Dense(4, name="logits")(nn.tanh(x))


def network():
    """A `Net` with weights and statistics that are all different, of 5 inputs."""
    params, stats = init_variables(Net(), jax.random.key(0), np.zeros((2, 1, 1, 5), np.float32))
    rng = np.random.default_rng(1)
    params, stats = (
        jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32), tree)
        for tree in (params, stats)
    )
    for layer in ("dense", "logits"):
        kernel = params[layer]["kernel"]
        params[layer]["kernel"] = rng.normal(0, 1, kernel.shape).astype(np.float32)
    return params, stats


def images(n):
    return RNG.normal(1, 2, (n, 1, 1, 5)).astype(np.float32)


def padded(x, size):
    """A batch of so many rows, of which those after x are NaN."""
    filled = np.full((size, *x.shape[1:]), np.nan, np.float32)
    filled[: len(x)] = x
    return {"image": filled, "mask": np.arange(size) < len(x)}


def by_hand(params, x, moments):
    """Logits of a `Net`, whose norms use what `moments` returns for their names and inputs."""
    x = x.reshape(len(x), 5)
    for name, after in (("norm0", "dense"), ("norm1", "logits")):
        mean, var = moments(name, x)
        x = (x - mean) / np.sqrt(var + EPSILON) * params[name]["scale"] + params[name]["bias"]
        x = np.tanh(x) if after == "logits" else x
        x = x @ params[after]["kernel"] + params[after]["bias"]
    return x


def double(tree):
    return jax.tree.map(np.float64, tree)


equal = partial(jax.tree.map, np.array_equal)
# Sums of 30 values of size 10 in float32.
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("keep", [0.0, 16 / (16 + 25), 1.0])
@pytest.mark.parametrize("by", ["batch", "population"])
def test_statistics_mixed_with_the_old_ones(by, keep):
    params, stats = network()
    x = images(25)
    # One batch, where each layer is to be normalised by it.
    cuts = [25] if by == "batch" else [8, 16, 25]
    batches = [padded(part, 32) for part in np.split(x, cuts[:-1]) if len(part)]
    adapted = precise(linen(Net(), params, stats), batches, keep=keep, by=by)
    assert adapted.params is params
    found = adapted.batch_stats
    old = double(stats)

    def mixed(name, x):
        own = x.mean(0), x.var(0)
        pairs = zip(("mean", "var"), own, strict=True)
        new = [keep * old[name][leaf] + (1 - keep) * of for leaf, of in pairs]
        close(found[name]["mean"], new[0])
        close(found[name]["var"], new[1])
        return new if by == "population" else own

    by_hand(double(params), np.float64(x), mixed)


def mean_entropy(params, x):
    """Of a `Net` whose norms normalise by the batch, in float64."""
    logits = by_hand(params, np.float64(x), lambda name, x: (x.mean(0), x.var(0)))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -(p * np.log(p)).sum(1).mean()


def test_the_gradient_of_the_entropy_goes_through_the_batch():
    params, stats = network()
    x = images(7)
    tx = affine_only(optax.sgd(1.0), params, stats, "*")
    step = jax.jit(partial(tent_step, tx=tx))
    new, _, logits, before = step(linen(Net(), params, stats), tx.init(params), padded(x, 9))
    assert logits.shape == (9, 4)
    close(before, mean_entropy(double(params), x))
    for norm in ("norm0", "norm1"):
        for leaf in ("scale", "bias"):
            for i in range(len(params[norm][leaf])):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = double(params)
                    moved[norm][leaf][i] += step
                    ends.append(mean_entropy(moved, x))
                slope = (ends[0] - ends[1]) / 2e-5
                close(params[norm][leaf][i] - new.params[norm][leaf][i], slope)


def test_tent_is_its_steps_and_then_precise_statistics():
    params, stats = network()
    batches, patterns = [padded(2 * images(n) + 1, 32) for n in (32, 20, 8)], ("norm1",)
    decay = optax.adamw(0.05, weight_decay=0.1)
    old = linen(Net(), params, stats)
    new = tent(old, batches, tx=decay, epochs=3, patterns=patterns)
    tx = affine_only(decay, params, stats, *patterns)
    step = jax.jit(partial(tent_step, tx=tx))
    mine, opt_state, entropies = old, tx.init(params), []
    for _ in range(3):
        for batch in batches:
            mine, opt_state, _, before = step(mine, opt_state, batch)
            entropies.append(before)
    jax.tree.map(close, new.params, mine.params)
    jax.tree.map(close, new.batch_stats, precise(mine, batches).batch_stats)
    assert sum(entropies[-3:]) < 0.98 * sum(entropies[:3])
    changed = {path for path, kept in flatten_dict(equal(params, new.params)).items() if not kept}
    assert changed == {("norm1", "scale"), ("norm1", "bias")}


def test_what_is_impossible_is_refused():
    batches, old = [{"image": images(4)}], linen(Net(), *network())
    with pytest.raises(ValueError, match="not an iterator"):
        tent(old, iter(batches), tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="no batch"):
        tent(old, [], tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="norm0, norm1"):
        tent(old, batches, tx=optax.sgd(0.1), patterns=("dense",))
    with pytest.raises(ValueError, match="from 0 to 1"):
        precise(old, batches, keep=1.1)
