"""One step at a time and many in one program are the same training, and what a bad step leaves."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
import synthetic

from bnjax.data.feed import host_feed, resident_feed
from bnjax.train import build
from bnjax.train.steps import Steps, unstack
from bnjax.train_step import train_step

STEPS = 8
DATA = synthetic.dataset()


@pytest.fixture(scope="module")
def experiment():
    # Adam would hide a gradient of another size.
    return dataclasses.replace(build.experiment(synthetic.config(), DATA), tx=optax.sgd(0.1))


def feed(kind, max_steps=STEPS, shuffle=True):
    if kind == "host":
        return host_feed(DATA.train, 10, shuffle=shuffle)
    return resident_feed(DATA.train, 10, shuffle=shuffle, max_steps=max_steps)


def numbers(tree):
    key = jax.dtypes.prng_key
    return [
        np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def take(steps, items, counts):
    """Takes so many steps in each dispatch; returns the leaves of the states and the metrics."""
    *states, bad_steps = steps.join([steps.init(0)], [0])
    metrics, items = [], iter(items)
    for count in counts:
        dispatch = [(item,) for item in itertools.islice(items, count)]
        *states, bad_steps, new = steps.train(*states, bad_steps, dispatch)
        metrics += [one for (one,) in unstack(new, count, 1)]
    return numbers(states), metrics


@pytest.fixture(scope="module")
def by_hand(experiment):
    """The plain loop of the front page, over the same batches."""
    state, batch_stats = Steps(experiment, DATA, feed("host")).init(0)
    step = jax.jit(functools.partial(train_step, model=experiment.model, tx=experiment.tx))
    metrics = []
    for batch in itertools.islice(feed("host").items(3, 0), STEPS):
        state, batch_stats, one = step(state, batch_stats, batch)
        metrics.append(one)
    return numbers((state, batch_stats)), metrics


@pytest.mark.parametrize(("kind", "counts"), [("host", [1] * STEPS), ("resident", [5, 3])])
def test_both_feeds_are_the_plain_loop(experiment, by_hand, kind, counts):
    steps = Steps(experiment, DATA, feed(kind, max_steps=5))
    leaves, metrics = take(steps, steps.feed.items(3, 0), counts)
    for mine, its in zip(metrics, by_hand[1], strict=True):
        assert (int(mine.correct), int(mine.count)) == (int(its.correct), int(its.count))
        np.testing.assert_allclose(mine.loss, its.loss, rtol=1e-5)
    for mine, its in zip(leaves, by_hand[0], strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)


def test_how_steps_are_grouped_changes_no_bit(experiment):
    steps = Steps(experiment, DATA, feed("resident"))
    wanted, _ = take(steps, steps.feed.items(3, 0), [8])
    for counts in ([1] * 8, [3, 5]):
        found, _ = take(steps, steps.feed.items(3, 0), counts)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_file_order_reaches_the_device_as_indices(experiment):
    (mine, _), (its, _) = (
        take(steps := Steps(experiment, DATA, feed(kind, shuffle=False)), steps.feed.items(0, 0), n)
        for kind, n in (("resident", [STEPS]), ("host", [1] * STEPS))
    )
    for ours, wanted in zip(mine, its, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "counts"), [("resident", [3, 5]), ("host", [1] * STEPS)])
@pytest.mark.parametrize("allowed", [0, 1])
def test_bad_steps_in_a_row_keep_the_state_before_them_once_they_are_too_many(
    experiment, kind, counts, allowed
):
    """Others have been dispatched before the host knows, and it wants to look at the first."""
    usual = feed(kind)
    items = [dict(item) for item in itertools.islice(usual.items(3, 0), STEPS)]
    bad = range(2, 3 + allowed)  # the third step, and perhaps the one after it

    def batch(resident, item):
        found = usual.batch(resident, item)
        label = jax.numpy.where(item["bad"], 99, found["label"])  # no such class: the loss is NaN
        return {**found, "label": label}

    spoilt = [item | {"bad": np.bool_(i in bad)} for i, item in enumerate(items)]
    some = dataclasses.replace(experiment, most_skipped=allowed)
    steps = Steps(some, DATA, dataclasses.replace(usual, batch=batch))
    leaves, metrics = take(steps, spoilt, counts)
    before, _ = take(Steps(experiment, DATA, usual), items, [2] if kind == "resident" else [1, 1])
    in_a_row = [0, 0, *range(1, STEPS - 1)]
    assert [int(one.skipped) for one in metrics] == in_a_row
    assert np.isfinite([one.loss for one in metrics][:2]).all()
    for mine, its in zip(leaves, before, strict=True):
        if mine.dtype != np.int32:  # the step counts on
            np.testing.assert_array_equal(mine, its)
    # One fewer than are too many stops nothing.
    more = dataclasses.replace(experiment, most_skipped=allowed + 1)
    steps = Steps(more, DATA, dataclasses.replace(usual, batch=batch))
    leaves, metrics = take(steps, spoilt, counts)
    assert [int(one.skipped) for one in metrics] == [
        0,
        0,
        *in_a_row[2 : bad.stop],
        *[0] * (STEPS - bad.stop),
    ]
    assert any((mine != its).any() for mine, its in zip(leaves, before, strict=True))
