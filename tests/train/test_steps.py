"""One step at a time and many in one program are the same training, and what a bad step leaves."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest
import synthetic

from bnjax.data.feed import host_feed, resident_feed, ship
from bnjax.train import build
from bnjax.train.steps import Steps, unstack
from bnjax.train_step import train_step

STEPS = 8
DATA = synthetic.dataset()


@pytest.fixture(scope="module")
def experiment():
    # Adam would hide a gradient of another size.
    found = build.experiment(synthetic.config(), DATA)
    return dataclasses.replace(found, tx=optax.sgd(0.1))


def feed(kind, shuffle=True, max_steps=STEPS):
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
    state, batch_stats = steps.init(jax.random.key(0))
    streak, metrics, items = steps.streak([0]), [], iter(items)
    for count in counts:
        shipment = ship(steps.feed, [(item,) for item in itertools.islice(items, count)])
        state, batch_stats, streak, new = steps.train(
            state, batch_stats, streak, steps.resident, *shipment
        )
        metrics += [one for (one,) in unstack(new, count, 1)]
    return numbers((state, batch_stats)), metrics


@pytest.fixture(scope="module")
def by_hand(experiment):
    """The plain loop of the front page, over the same batches."""
    state, batch_stats = Steps(experiment, DATA, feed("host")).init(jax.random.key(0))
    step = functools.partial(train_step, model=experiment.model, tx=experiment.tx)
    metrics = []
    for batch in itertools.islice(feed("host").items(3, 0), STEPS):
        state, batch_stats, one = jax.jit(step)(state, batch_stats, batch)
        metrics.append(one)
    return numbers((state, batch_stats)), metrics


@pytest.mark.parametrize("kind", ["host", "resident"])
def test_both_feeds_are_the_plain_loop(experiment, by_hand, kind):
    steps = Steps(experiment, DATA, feed(kind, max_steps=5))
    items = steps.feed.items(3, 0)
    leaves, metrics = take(steps, items, [1] * STEPS if kind == "host" else [5, 3])
    assert [(int(one.correct), int(one.count)) for one in metrics] == [
        (int(one.correct), int(one.count)) for one in by_hand[1]
    ]
    losses = [[one.loss for one in found] for found in (metrics, by_hand[1])]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for mine, its in zip(leaves, by_hand[0], strict=True):
        np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)


def test_how_steps_are_grouped_changes_no_bit(experiment):
    steps = Steps(experiment, DATA, feed("resident"))
    wanted, _ = take(steps, steps.feed.items(3, 0), [8])
    for counts in ([1] * 8, [3, 5], [1, 2, 4, 1]):
        found, _ = take(steps, steps.feed.items(3, 0), counts)
        for mine, its in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(mine, its)


def test_file_order_reaches_the_device_as_indices(experiment):
    one, many = (
        Steps(experiment, DATA, feed(kind, shuffle=False)) for kind in ("host", "resident")
    )
    its, _ = take(one, one.feed.items(0, 0), [1] * STEPS)
    mine, _ = take(many, many.feed.items(0, 0), [STEPS])
    for ours, wanted in zip(mine, its, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counts", [[8], [3, 5], [1] * 8])
@pytest.mark.parametrize("max_skipped", [0, 1])
def test_after_too_many_bad_steps_the_state_stays_what_the_first_of_them_met(
    experiment, counts, max_skipped
):
    """Else the step cannot be looked at: others have been taken before the host knows of it."""
    some = dataclasses.replace(experiment, most_skipped=max_skipped)
    usual = feed("resident")
    label = DATA.train.label.copy()
    items = list(itertools.islice(usual.items(3, 0), STEPS))
    bad = range(2, 3 + max_skipped)  # the third step, and the one after it
    label[np.concatenate([items[i]["index"] for i in bad])] = 99  # no such class: the loss is NaN
    spoilt = dataclasses.replace(usual, resident=(usual.resident[0], label))
    good = [i for i in range(STEPS) if i in bad or not (label[items[i]["index"]] == 99).any()]
    assert good[:3] == [0, 1, 2], "the batches before have to be whole"
    steps = Steps(some, DATA, spoilt)
    leaves, metrics = take(steps, items, counts)
    before, _ = take(Steps(experiment, DATA, usual), items, [2])
    assert [int(one.skipped) for one in metrics[: bad.stop]] == [0, 0, *[1] * len(bad)]
    for mine, its in zip(leaves, before, strict=True):
        if mine.dtype != np.int32:  # the step counts on
            np.testing.assert_array_equal(mine, its)


def test_fewer_bad_steps_than_are_allowed_stop_nothing(experiment):
    some = dataclasses.replace(experiment, most_skipped=1)
    usual = feed("host")
    items = [dict(item) for item in itertools.islice(usual.items(3, 0), 4)]
    items[1]["label"] = np.full(10, 99, np.int32)
    found, metrics = take(Steps(some, DATA, usual), items, [1] * 4)
    without, _ = take(Steps(some, DATA, usual), [items[0]], [1])
    assert [int(one.skipped) for one in metrics] == [0, 1, 0, 0]
    assert any((mine != its).any() for mine, its in zip(found, without, strict=True))
