"""Augmentation in the training program: its randomness, its batches, and several devices."""

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
from bnjax.train.steps import Steps, training_batch
from bnjax.train_step import train_step

DATA = synthetic.dataset()
EVERY = {"flip": "alternating", "translate": 1, "crop": 1, "brightness": 0.1, "contrast": 0.1}
EVERY |= {"cutout": 2, "mixup": 0.3}


def experiment(devices=1, **augment):
    config = synthetic.config(steps=8)
    config.devices, config.model.dropout, config.train.batch_size = devices, (0.0,), 12
    config.augment.update(augment)
    return dataclasses.replace(build.experiment(config, DATA), tx=optax.sgd(0.1))


def feed(kind, part):
    if kind == "host":
        return host_feed(DATA.train, 12, shuffle=True, part=part)
    return resident_feed(DATA.train, 12, shuffle=True, max_steps=3, part=part)


@pytest.mark.parametrize("kind", ["host", "resident"])
def test_feeds_say_which_image_each_example_is_and_of_which_epoch(kind):
    found = feed(kind, experiment().part)
    for step, item in enumerate(itertools.islice(found.items(0, 2), 4), 2):
        batch = jax.tree.map(np.asarray, found.batch(found.resident, item))
        np.testing.assert_array_equal(batch["image"], DATA.train.image[batch["index"]])
        np.testing.assert_array_equal(batch["label"], DATA.train.label[batch["index"]])
        np.testing.assert_array_equal(batch["epoch"], np.arange(step * 12, step * 12 + 12) // 48)


def test_each_key_of_the_config_changes_the_batch_of_a_step_and_the_next_step_differs():
    plain = experiment()
    state, _ = Steps(plain, DATA, feed("host", plain.part)).init(0)
    later = dataclasses.replace(state, step=state.step + 1)
    batch = next(feed("host", plain.part).items(0, 0))
    assert set(training_batch(plain, state, batch)) == {"image", "label"}
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
    for item in itertools.islice(feed("host", experiment().part).items(0, 0), 2):
        *wanted, _ = by_hand(*wanted, item)
    found, _ = synthetic.take(steps, ((item,) for item in steps.feed.items(0, 0)), counts)
    trees = [(state.params, stats) for state, stats in (found, wanted)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), *trees)
