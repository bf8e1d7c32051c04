"""One step at a time and many in one program are the same training, with augmentation and without.

What a bad step leaves.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import synthetic

from bnjax.data.batches import WHOLE
from bnjax.data.feed import host_feed, resident_feed
from bnjax.train import build
from bnjax.train.steps import Steps, training_batch
from bnjax.train_step import train_step

STEPS = 8
DATA = synthetic.dataset()
KINDS = {"host": [1] * STEPS, "resident": [3, 5]}  # how many steps each dispatch takes
EVERY = {"flip": "alternating", "translate": 1, "crop": 1, "brightness": 0.1, "contrast": 0.1}
EVERY |= {"cutout": 2, "mixup": 0.3}


def feed(kind, part=WHOLE, batch_size=12, shuffle=True):
    options = {"shuffle": shuffle, "part": part}
    if kind == "host":
        return host_feed(DATA.train, batch_size, **options)
    return resident_feed(DATA.train, batch_size, max_steps=STEPS, **options)


def experiment(devices=1, dropout=0.0, batch_size=12, **augment):
    """Of SGD: Adam would hide a gradient of another size. One bad step may be skipped."""
    config = synthetic.config()
    config.devices, config.model.dropout = devices, (dropout,)
    config.train.batch_size = batch_size
    config.augment.update(augment)
    made = build.experiment(config, DATA)
    return dataclasses.replace(made, tx=optax.sgd(0.1), most_skipped=1)


PLAIN = experiment(dropout=0.3, batch_size=10)


@pytest.fixture(scope="module")
def compiled():
    """The steps of each feed, whose items say whether the step is bad."""

    def steps(usual):
        def batch(resident, item):
            found = usual.batch(resident, {key: item[key] for key in item if key != "bad"})
            return {**found, "label": jnp.where(item["bad"], 99, found["label"])}  # no such class

        return Steps(PLAIN, DATA, dataclasses.replace(usual, batch=batch))

    return {kind: steps(feed(kind, batch_size=10)) for kind in KINDS}


def take(steps, counts, bad=()):
    """Returns the leaves of the states and the metrics of each step."""
    items = enumerate(steps.feed.items(3, 0))
    spoilt = ((item | {"bad": np.bool_(i in bad)},) for i, item in items)
    (state, stats), metrics = synthetic.take(steps, spoilt, counts)
    return leaves(state, stats), [one for (one,) in metrics]


def leaves(state, stats):
    return [*map(np.asarray, jax.tree.leaves((state.params, state.opt_state, stats)))]


def test_both_feeds_are_the_plain_loop(compiled):
    """The loop of the front page, over the same batches."""
    both, wanted = compiled["host"].init(0), []
    step = jax.jit(functools.partial(train_step, model=PLAIN.model, tx=PLAIN.tx))
    for batch in itertools.islice(feed("host", batch_size=10).items(3, 0), STEPS):
        *both, one = step(*both, batch)
        wanted.append(one)
    for kind, counts in KINDS.items():
        found, metrics = take(compiled[kind], counts)
        for mine, its in zip(metrics, wanted, strict=True):
            assert (int(mine.correct), int(mine.count)) == (int(its.correct), int(its.count))
            np.testing.assert_allclose(mine.loss, its.loss, rtol=1e-5)
        for mine, its in zip(found, leaves(*both), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-4, atol=1e-6)


def test_how_steps_are_grouped_changes_no_bit(compiled):
    found = [take(compiled["resident"], counts)[0] for counts in ([8], [1] * 8, [3, 5])]
    for others in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, others, found[0])


@pytest.mark.parametrize("kind", KINDS)
def test_bad_steps_in_a_row_keep_the_state_before_them_once_they_are_too_many(compiled, kind):
    """Others have been dispatched before the host knows, and it wants to look at the first."""
    before, _ = take(compiled[kind], [2] if kind == "resident" else [1, 1])
    after, metrics = take(compiled[kind], KINDS[kind], bad=(2, 3))
    assert [int(one.skipped) for one in metrics] == [0, 0, *[1] * (STEPS - 2)]
    assert np.isfinite([one.loss for one in metrics][:2]).all()
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # As many as are allowed stop nothing.
    after, metrics = take(compiled[kind], KINDS[kind], bad=(2, 4))
    assert [int(one.skipped) for one in metrics] == [0, 0, 1, 0, 1, 0, 0, 0]
    assert any((mine != its).any() for mine, its in zip(after, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_feeds_say_which_image_each_example_is_and_of_which_epoch(kind, shuffle):
    found = feed(kind, shuffle=shuffle)
    for step, item in enumerate(itertools.islice(found.items(0, 2), 4), 2):
        batch = jax.tree.map(np.asarray, found.batch(found.resident, item))
        position = np.arange(step * 12, step * 12 + 12)
        for name in ("image", "label"):
            np.testing.assert_array_equal(batch[name], getattr(DATA.train, name)[batch["index"]])
        assert (batch["index"] == position % 48).all() != shuffle
        np.testing.assert_array_equal(batch["epoch"], position // 48)


def test_each_augmentation_changes_the_batch_of_a_step_and_the_next_step_differs():
    state, _ = Steps(PLAIN, DATA, feed("host")).init(0)
    later, batch = state.replace(step=state.step + 1), next(feed("host").items(0, 0))
    assert set(training_batch(PLAIN, state, batch)) == {"image", "label"}
    for key, value in EVERY.items():
        one = jax.jit(functools.partial(training_batch, experiment(**{key: value})))
        first, again, second = (np.asarray(one(of, batch)["image"]) for of in (state, state, later))
        np.testing.assert_array_equal(first, again)
        assert (first != batch["image"] / (1 if first.dtype == np.uint8 else 255)).any(), key
        assert (first == second).all() == (key == "flip"), key


@pytest.mark.parametrize(
    ("kind", "devices", "counts"),
    [("resident", 4, [2]), pytest.param("host", 1, [1, 1], marks=pytest.mark.slow)],
)
def test_the_program_trains_on_the_augmented_batch(kind, devices, counts):
    made = experiment(devices, **EVERY)
    steps = Steps(made, DATA, feed(kind, made.part))
    options = {"model": made.model, "tx": made.tx, "loss_fn": made.loss_fn}

    @jax.jit
    def by_hand(state, stats, item):
        return train_step(state, stats, training_batch(made, state, item), **options)

    wanted = steps.init(0)
    for item in itertools.islice(feed("host").items(0, 0), 2):
        *wanted, _ = by_hand(*wanted, item)
    found, _ = synthetic.take(steps, ((item,) for item in steps.feed.items(0, 0)), counts)
    trees = [(state.params, stats) for state, stats in (found, wanted)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *trees)
