"""Adaptation without labels, against the formulas in NumPy's float64."""

from functools import partial

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from foreign import drawn
from numpy_network import IMAGES, Net, in_numpy, padded
from zoo.kit import precise

from bnjax.clinic.adaptation import affine_only, tent, tent_step
from bnjax.clinic.linen import linen

PARAMS, STATS = drawn(Net(), IMAGES[:1])
OLD = linen(Net(), PARAMS, STATS)
# Sums of 30 values of size 10 in float32.
close = partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def mean_entropy(params, x):
    """Of a `Net` whose norms normalise by the batch, in float64."""
    logits = in_numpy(params, x, lambda name, x: (x.mean(0), x.var(0)))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return -(p * np.log(p)).sum(1).mean()


def test_the_gradient_of_the_entropy_goes_through_the_batch():
    x, tx = IMAGES[:7], affine_only(optax.sgd(1.0), PARAMS, STATS, "*")
    new, _, logits, before = jax.jit(partial(tent_step, tx=tx))(OLD, tx.init(PARAMS), padded(x, 9))
    assert logits.shape == (9, 5)
    close(before, mean_entropy(PARAMS, x))
    for norm in STATS:
        for leaf in ("scale", "bias"):
            for i in range(len(PARAMS[norm][leaf])):
                ends = []
                for step in (1e-5, -1e-5):
                    moved = jax.tree.map(np.float64, PARAMS)
                    moved[norm][leaf][i] += step
                    ends.append(mean_entropy(moved, x))
                slope = (ends[0] - ends[1]) / 2e-5
                close(PARAMS[norm][leaf][i] - new.params[norm][leaf][i], slope)


def test_tent_is_its_steps_and_then_precise_statistics():
    batches = [padded(2 * IMAGES[:n] + 1, 16) for n in (16, 10, 5)]
    decay = optax.adamw(0.05, weight_decay=0.1)
    new = tent(OLD, batches, tx=decay, epochs=3, patterns=("third",))
    tx = affine_only(decay, PARAMS, STATS, "third")
    step = jax.jit(partial(tent_step, tx=tx))
    mine, opt_state, entropies = OLD, tx.init(PARAMS), []
    for batch in 3 * batches:
        mine, opt_state, _, before = step(mine, opt_state, batch)
        entropies.append(before)
    jax.tree.map(close, new.params, mine.params)
    jax.tree.map(close, new.batch_stats, precise(mine, batches).batch_stats)
    assert sum(entropies[-3:]) < 0.98 * sum(entropies[:3])
    kept = flatten_dict(jax.tree.map(np.array_equal, PARAMS, new.params))
    assert {path for path in kept if not kept[path]} == {("third", "scale"), ("third", "bias")}


@pytest.mark.parametrize(
    ("batches", "patterns", "words"),
    [
        (iter([{"image": IMAGES}]), "*", "not an iterator"),
        ([], "*", "no batch"),
        ([{"image": IMAGES}], "dense", "first, second, third"),
    ],
)
def test_what_is_impossible_is_refused(batches, patterns, words):
    with pytest.raises(ValueError, match=words):
        tent(OLD, batches, tx=optax.sgd(0.1), patterns=(patterns,))
