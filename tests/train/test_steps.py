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
from bnjax.train.steps import Steps
from bnjax.train_step import train_step

STEPS = 8
DATA = synthetic.dataset()
KINDS = {"host": [1] * STEPS, "resident": [3, 5]}  # how many steps each dispatch takes


def feed(kind, shuffle=True):
    if kind == "host":
        return host_feed(DATA.train, 10, shuffle=shuffle)
    return resident_feed(DATA.train, 10, shuffle=shuffle, max_steps=STEPS)


@pytest.fixture(scope="module")
def experiment():
    """Of SGD: Adam would hide a gradient of another size. One bad step may be skipped."""
    usual = build.experiment(synthetic.config(), DATA)
    return dataclasses.replace(usual, tx=optax.sgd(0.1), most_skipped=1)


@pytest.fixture(scope="module")
def compiled(experiment):
    """The steps of each feed, whose items say whether the step is bad."""

    def steps(usual):
        def batch(resident, item):
            found = usual.batch(resident, {key: item[key] for key in item if key != "bad"})
            label = jax.numpy.where(item["bad"], 99, found["label"])  # no such class: NaN
            return {**found, "label": label}

        return Steps(experiment, DATA, dataclasses.replace(usual, batch=batch))

    return {kind: steps(feed(kind)) for kind in KINDS}


def take(steps, items, counts, bad=()):
    """Returns the leaves of the states and the metrics of each step."""
    spoilt = ((item | {"bad": np.bool_(i in bad)},) for i, item in enumerate(items))
    (state, stats), metrics = synthetic.take(steps, spoilt, counts)
    return leaves(state, stats), [one for (one,) in metrics]


def leaves(state, stats):
    return [*map(np.asarray, jax.tree.leaves((state.params, state.opt_state, stats)))]


@pytest.mark.parametrize("shuffle", [True, False])
def test_both_feeds_are_the_plain_loop(experiment, compiled, shuffle):
    """The loop of the front page, over the same batches."""
    state, batch_stats = compiled["host"].init(0)
    step = jax.jit(functools.partial(train_step, model=experiment.model, tx=experiment.tx))
    wanted = []
    for batch in itertools.islice(feed("host", shuffle).items(3, 0), STEPS):
        state, batch_stats, one = step(state, batch_stats, batch)
        wanted.append(one)
    for kind, counts in KINDS.items():
        found, metrics = take(compiled[kind], feed(kind, shuffle).items(3, 0), counts)
        for mine, its in zip(metrics, wanted, strict=True):
            assert (int(mine.correct), int(mine.count)) == (int(its.correct), int(its.count))
            np.testing.assert_allclose(mine.loss, its.loss, rtol=1e-5)
        for mine, its in zip(found, leaves(state, batch_stats), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)


def test_how_steps_are_grouped_changes_no_bit(compiled):
    steps = compiled["resident"]
    found = [take(steps, steps.feed.items(3, 0), n)[0] for n in ([8], [1] * 8, [3, 5])]
    for others in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, others, found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_bad_steps_in_a_row_keep_the_state_before_them_once_they_are_too_many(compiled, kind):
    """Others have been dispatched before the host knows, and it wants to look at the first."""
    steps = compiled[kind]
    before, _ = take(steps, steps.feed.items(3, 0), [2] if kind == "resident" else [1, 1])
    after, metrics = take(steps, steps.feed.items(3, 0), KINDS[kind], bad=(2, 3))
    assert [int(one.skipped) for one in metrics] == [0, 0, *[1] * (STEPS - 2)]
    assert np.isfinite([one.loss for one in metrics][:2]).all()
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # As many as are allowed stop nothing.
    after, metrics = take(steps, steps.feed.items(3, 0), KINDS[kind], bad=(2, 4))
    assert [int(one.skipped) for one in metrics] == [0, 0, 1, 0, 1, 0, 0, 0]
    assert any((mine != its).any() for mine, its in zip(after, before, strict=True))
