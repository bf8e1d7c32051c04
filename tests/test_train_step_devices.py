"""`train_step` under every wrapper: gradients and parameters as on one device."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from wrappers import MAPPED, WRAPPERS, wrap

from bnjax.models.convnet import ConvNet
from bnjax.norms import BatchNorm
from bnjax.train_step import init_state, train_step

pytestmark = pytest.mark.lane

# SGD shows a gradient that is n times too large, where Adam would hide it; its trace holds the
# gradients.
SGD = optax.sgd(0.05, momentum=0.9)
MASKS = {
    "even": np.ones(24, bool),
    "uneven": np.arange(24) < 17,
}  # uneven: the last two shards of three hold padding only


@functools.cache
def network(axis_name, dropout=0.0):
    return ConvNet(
        filters=(4,),
        kernels=(3,),
        strides=(2,),
        dense=(8,),
        classes=3,
        norm=partial(BatchNorm, momentum=0.75, axis_name=axis_name),
        norm_dense=(True,),
        dropout=(dropout,),
    )


def batch_of(step, mask):
    rng = np.random.default_rng(step)
    image = (
        rng.normal(size=(24, 7, 7, 1)).astype(np.float32)
        + np.arange(24, dtype=np.float32).reshape(24, 1, 1, 1) / 8
    )
    return {"image": image, "label": rng.integers(0, 3, 24), "mask": mask}


@functools.cache
def start(model):
    return jax.device_get(
        jax.jit(partial(init_state, model, SGD))(
            jax.random.PRNGKey(0), np.zeros((2, 7, 7, 1), np.float32)
        )
    )


@functools.cache
def train(wrapper, dropout=0.0):
    """Returns a function of the mask: state, statistics and metrics of each of five steps."""

    def make(axis_name):
        step = partial(train_step, model=network(axis_name, dropout), tx=SGD, axis_name=axis_name)

        def carry(carried, batch):
            *carried, metrics = step(*carried, batch)
            return (tuple(carried), metrics), {}

        return carry

    compiled = wrap(wrapper, make)

    def trained(mask):
        carried, history = start(network(None)), []
        for step in range(5):
            (carried, metrics), _ = compiled(carried, batch_of(step, mask))
            history.append((carried, metrics))
        return history

    return trained


def close(actual, expected):
    """Compares histories: each number to 1e-4 of itself or 1e-5 of the largest of its kind.

    A gradient sums up 24 examples at 9 positions, and what cancels there leaves roundings of the
    terms: 216 times 2**-24.
    """
    for ((state, *stats), metrics), ((other, *others), counted) in zip(
        actual, expected, strict=True
    ):
        kinds = zip(
            (state.params, state.opt_state, stats, metrics),
            (other.params, other.opt_state, others, counted),
            strict=True,
        )
        for mine, its in kinds:
            atol = 1e-5 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(its))
            jax.tree.map(
                lambda a, b, atol=atol: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol),
                mine,
                its,
            )
        np.testing.assert_array_equal(state.step, other.step)
        np.testing.assert_array_equal(state.rng, other.rng)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradients_and_parameters_are_those_of_one_device(wrapper):
    trained, on_one = train(wrapper), train("one device")
    for mask in MASKS:
        close(trained(MASKS[mask]), on_one(MASKS[mask]))


def test_dropout_under_jit_with_shardings_is_that_of_one_device():
    close(
        train("jit with shardings", dropout=0.5)(MASKS["uneven"]),
        train("one device", dropout=0.5)(MASKS["uneven"]),
    )


class Dropped(nn.Module):
    """Stores which units it dropped."""

    @nn.compact
    def __call__(self, x, train):
        kept = nn.Dropout(0.5, deterministic=not train)(jnp.ones((1, 64)))
        self.variable("batch_stats", "kept", jnp.zeros, (1, 64)).value = kept
        return nn.Dense(3)(x.reshape(x.shape[0], -1)) + kept.mean()


@pytest.mark.parametrize("wrapper", MAPPED)
def test_dropout_in_mapped_wrappers_differs_from_shard_to_shard(wrapper):
    def make(axis_name):
        def step(carried, batch):
            state, stats, _ = train_step(
                *carried, batch, model=Dropped(), tx=SGD, axis_name=axis_name
            )
            return state, stats["kept"]

        return step

    _, kept = wrap(wrapper, make)(start(Dropped()), batch_of(0, MASKS["even"]))
    assert len(np.unique(kept, axis=0)) == 8
