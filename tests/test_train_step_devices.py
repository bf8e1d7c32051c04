"""`train_step` under every wrapper: gradients and parameters as on one device."""

import functools
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from wrappers import MAPPED, WRAPPERS, close, wrap

from bnjax.models.convnet import ConvNet
from bnjax.norms import BatchNorm
from bnjax.train_step import init_state, train_step

pytestmark = pytest.mark.lane

# SGD shows a gradient that is n times too large, where Adam would hide it; its trace holds the
# gradients.
SGD = optax.sgd(0.05, momentum=0.9)
# With the second, the last two shards of three hold padding only.
MASKS = np.arange(24) < 24, np.arange(24) < 17


def network(axis_name, dropout):
    norm = partial(BatchNorm, momentum=0.75, axis_name=axis_name)
    small = {"filters": (4,), "kernels": (3,), "strides": (2,), "dense": (8,), "classes": 3}
    return ConvNet(norm=norm, norm_dense=(True,), dropout=(dropout,), **small)


def batch_of(step, mask):
    rng = np.random.default_rng(step)
    image = rng.normal(size=(24, 7, 7, 1)) + np.arange(24).reshape(24, 1, 1, 1) / 8
    return {"image": image.astype(np.float32), "label": rng.integers(0, 3, 24), "mask": mask}


def start(model):
    init = jax.jit(partial(init_state, model, SGD))
    return jax.device_get(init(jax.random.PRNGKey(0), np.zeros((2, 7, 7, 1), np.float32)))


def compiled(wrapper, model_of, results):
    """`results` sorts the results of a step into replicated and sharded ones."""

    def make(axis_name):
        step = partial(train_step, model=model_of(axis_name), tx=SGD, axis_name=axis_name)
        return lambda both, batch: results(*step(*both, batch))

    return wrap(wrapper, make)


@functools.cache
def train(wrapper, dropout):
    """Returns the state, the statistics and the metrics of each of five steps with each mask."""
    step = compiled(wrapper, partial(network, dropout=dropout), lambda *of_step: (of_step, {}))
    history = []
    for mask in MASKS:
        both = start(network(None, dropout))
        for i in range(5):
            (*both, metrics), _ = step(tuple(both), batch_of(i, mask))
            history.append((*both, metrics))
    return history


@pytest.mark.parametrize(
    ("wrapper", "dropout"), [*((name, 0.0) for name in WRAPPERS), (WRAPPERS[0], 0.5)]
)
def test_parameters_gradients_and_statistics_are_those_of_one_device(wrapper, dropout):
    histories = train(wrapper, dropout), train("one device", dropout)
    for (state, *mine), (other, *its) in zip(*histories, strict=True):
        close((state.params, state.opt_state, *mine), (other.params, other.opt_state, *its))
        assert (state.step, *state.rng) == (other.step, *other.rng)


class Dropped(nn.Module):
    """Stores which units it dropped."""

    @nn.compact
    def __call__(self, x, train):
        kept = nn.Dropout(0.5, deterministic=not train)(jnp.ones((1, 64)))
        self.variable("batch_stats", "kept", jnp.zeros, (1, 64)).value = kept
        return nn.Dense(3)(x.reshape(x.shape[0], -1)) + kept.mean()


@pytest.mark.parametrize("wrapper", ["one device", *MAPPED])
def test_dropout_differs_between_steps_and_shards_and_repeats_with_the_state(wrapper):
    step = compiled(wrapper, lambda _: Dropped(), lambda state, stats, _: (state, stats["kept"]))
    (state, stats), batch = start(Dropped()), batch_of(0, MASKS[0])
    second, kept = step((state, stats), batch)
    _, again = step((state, stats), batch)
    _, later = step((second, stats), batch)
    np.testing.assert_array_equal(kept, again)
    assert (kept != later).any(-1).all()
    assert len(np.unique(kept, axis=0)) == len(kept) == (1 if wrapper == "one device" else 8)
