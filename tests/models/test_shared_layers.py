"""Products against NumPy in float64 on operands that it rounded; views against means by hand."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from bnjax.models.layers import Views, bfloat16_dot_general, bfloat16_product, with_views
from bnjax.train_step import init_state, train_step

RNG = np.random.default_rng(0)
X, WEIGHT, DY = (
    RNG.normal(size=shape).astype(np.float32) for shape in ((7, 300), (300, 11), (7, 11))
)


def rounded(values):
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


@pytest.mark.parametrize("shape", [(6, 300), (2, 3, 300)])
def test_operands_are_rounded_and_sums_are_not(shape):
    dense, x = nn.Dense(11, dot_general=bfloat16_dot_general), X[:6].reshape(shape)
    found = np.asarray(dense.apply({"params": {"kernel": WEIGHT, "bias": DY[0]}}, x))
    assert found.dtype == np.float32
    assert_allclose(found, rounded(x) @ rounded(WEIGHT) + DY[0], atol=1e-4)
    assert np.abs(found - x.astype(np.float64) @ WEIGHT - DY[0]).max() > 1e-3  # it was rounded


def test_both_gradients_have_rounded_operands():
    dx, dweight = jax.vjp(bfloat16_product, jnp.asarray(X), jnp.asarray(WEIGHT))[1](DY)
    assert_allclose(dx, rounded(DY) @ rounded(WEIGHT).T, atol=1e-4)
    assert_allclose(dweight, rounded(X).T @ rounded(DY), atol=1e-4)


def test_other_products_are_refused():
    with pytest.raises(ValueError, match=r"inputs \[..., k\]"):
        bfloat16_dot_general(X, WEIGHT.T, (((1,), (1,)), ((), ())))


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
    assert_allclose(found, by_hand(IMAGES, views), atol=1e-5)


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
    assert_allclose(found[again], by_hand(IMAGES, 6)[again], atol=1e-5)
    assert_allclose(found[~again], plain(IMAGES)[~again], rtol=0, atol=1e-6)


def test_parameters_statistics_and_training_are_those_of_the_network():
    tx, batch = optax.sgd(0.1), {"image": IMAGES, "label": LABEL}
    results = []
    for model in (Net(), Views(Net())):
        state, stats = init_state(model, tx, jax.random.key(0), IMAGES)
        results.append(jax.jit(partial(train_step, model=model, tx=tx))(state, stats, batch))
    mine, its = ((state.params, stats, metrics) for state, stats, metrics in results)
    jax.tree.map(assert_array_equal, mine, its)
