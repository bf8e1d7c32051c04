"""One step at a time and many in one program are the same training."""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest
import synthetic

from bnjax.data.batches import take, train_rows
from bnjax.train import build, dispatch
from bnjax.train_step import init_state, train_step

STEPS = 8


@pytest.fixture(scope="module")
def training():
    """A bound step, a fresh state, and the rows of eight batches across the end of an epoch."""
    data, config = synthetic.dataset(), synthetic.config()
    model, tx = (
        build.experiment(config, data).model,
        optax.sgd(0.1),
    )  # Adam would hide a gradient of another size
    step = functools.partial(train_step, model=model, tx=tx, skip_nonfinite=True)
    rows = list(
        itertools.islice(train_rows(len(data.train.label), 10, key=jax.random.key(3)), STEPS)
    )
    return (
        step,
        lambda: jax.jit(functools.partial(init_state, model, tx))(
            jax.random.key(0), data.train.image[:1]
        ),
        data.train,
        rows,
    )


def run(dispatched, initial, rows, counts):
    state, batch_stats = initial
    metrics, rows = [], iter(rows)
    for count in counts:
        state, batch_stats, several = dispatched.advance(
            state, batch_stats, list(itertools.islice(rows, count))
        )
        metrics += dispatch.unstack(several, count)
    leaves = [
        jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(state)
    ]
    return [np.asarray(leaf) for leaf in (*leaves, *jax.tree.leaves(batch_stats))], metrics


@pytest.fixture(scope="module")
def by_hand(training):
    """The plain loop of the README."""
    step, fresh, split, rows = training
    state, batch_stats = fresh()
    metrics = []
    for of_step in rows:
        state, batch_stats, one = jax.jit(step)(state, batch_stats, take(split, of_step))
        metrics.append(one)
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, batch_stats))], metrics


@pytest.mark.parametrize("way", ["one", "many"])
def test_both_ways_are_the_plain_loop(training, by_hand, way):
    step, fresh, split, rows = training
    dispatched = (
        dispatch.one_at_a_time(step, split, {})
        if way == "one"
        else dispatch.many_at_a_time(step, split, {}, most=5)
    )
    leaves, metrics = run(dispatched, fresh(), rows, [1] * STEPS if way == "one" else [5, 3])
    assert [(int(one.correct), int(one.count)) for one in metrics] == [
        (int(one.correct), int(one.count)) for one in by_hand[1]
    ]
    np.testing.assert_allclose(
        [one.loss for one in metrics], [one.loss for one in by_hand[1]], rtol=1e-5
    )
    for leaf in by_hand[0]:
        assert any(
            leaf.shape == mine.shape and np.allclose(leaf, mine, rtol=1e-4, atol=1e-6)
            for mine in leaves
        )


def test_how_steps_are_grouped_changes_no_bit(training):
    step, fresh, split, rows = training
    dispatched = dispatch.many_at_a_time(step, split, {}, most=STEPS)
    wanted, _ = run(dispatched, fresh(), rows, [8])
    for counts in ([1] * 8, [3, 5], [1, 2, 4, 1]):
        found, _ = run(dispatched, fresh(), rows, counts)
        for mine, its in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, its)


def test_file_order_reaches_the_device_as_indices(training):
    step, fresh, split, _ = training
    rows = list(itertools.islice(train_rows(len(split.label), 10, key=None), STEPS))
    assert any(isinstance(of_step, slice) for of_step in rows)
    one, _ = run(dispatch.one_at_a_time(step, split, {}), fresh(), rows, [1] * STEPS)
    many, _ = run(dispatch.many_at_a_time(step, split, {}, most=STEPS), fresh(), rows, [STEPS])
    for mine, its in zip(many, one, strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)
