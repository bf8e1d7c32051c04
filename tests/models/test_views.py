"""Test-time augmentation against means taken by hand."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from bnjax.models.layers import Views, with_views
from bnjax.train_step import init_state, train_step

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(12, 6, 5, 2)).astype(np.float32)
LABEL = np.arange(12) % 3


class Net(nn.Module):
    """Has a norm, and takes left from right."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


VARIABLES = jax.jit(partial(Net().init, train=False))(jax.random.key(0), IMAGES)


def evaluated(model, images, **options):
    return np.asarray(jax.jit(partial(model.apply, train=False))(VARIABLES, images, **options))


def plain(images):
    return evaluated(Net(), images)


def by_hand(images, views):
    wide = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shown = {1: [(images, 1.0)], 2: [(images, 0.5), (images[:, :, ::-1], 0.5)]}
    shown[6] = [(one, weight / 2) for one, weight in shown[2]]
    for moved in (wide[:, :-2, :-2], wide[:, 2:, 2:]):
        shown[6] += [(moved, 0.125), (moved[:, :, ::-1], 0.125)]
    assert sum(weight for _, weight in shown[views]) == 1
    return sum(weight * plain(one) for one, weight in shown[views])


@pytest.mark.parametrize("views", [1, 2, 6])
def test_logits_are_the_mean_over_the_views(views):
    found = evaluated(with_views(Net(), views), IMAGES)
    np.testing.assert_allclose(found, by_hand(IMAGES, views), atol=1e-5)


class Masked(Net):
    """The same, with a mask that it does not need."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        return Net.__call__(self, x, train=train)


@pytest.mark.parametrize("padding", [0, 4])
def test_only_the_least_certain_are_looked_at_again_and_no_padding(padding):
    order = np.argsort(np.asarray(jax.nn.softmax(plain(IMAGES))).max(-1))
    mask, again = (np.isin(np.arange(12), of) for of in (order[padding:], order[padding:][:3]))
    options = {"mask": mask} if padding else {}
    found = evaluated(Views(Masked() if padding else Net(), 6, share=0.25), IMAGES, **options)
    np.testing.assert_allclose(found[again], by_hand(IMAGES, 6)[again], atol=1e-5)
    np.testing.assert_allclose(found[~again], plain(IMAGES)[~again], rtol=0, atol=1e-6)


def test_parameters_statistics_and_training_are_those_of_the_network():
    tx, batch = optax.sgd(0.1), {"image": IMAGES, "label": LABEL}
    results = []
    for model in (Net(), Views(Net())):
        state, stats = init_state(model, tx, jax.random.key(0), IMAGES)
        results.append(jax.jit(partial(train_step, model=model, tx=tx))(state, stats, batch))
    mine, its = ((state.params, stats, metrics) for state, stats, metrics in results)
    jax.tree.map(np.testing.assert_array_equal, mine, its)
