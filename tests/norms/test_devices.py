"""BatchNorm over eight devices against NumPy on all of the batch."""

import functools

import jax
import numpy as np
import pytest
from equations import assert_moments
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from wrappers import AXIS, DEVICES, MAPPED, WRAPPERS, run

from bnjax.norms import BatchNorm

pytestmark = pytest.mark.lane

CHANNELS = 3


def layer(over="axis_name", **options):
    """Returns what `run` takes: statistics are replicated, outputs divided up."""

    def make(axis_name):
        norm = BatchNorm(False, momentum=0.0, **{over: axis_name}, **options)

        def apply(variables, batch):
            x, mask = batch["x"], batch.get("mask")
            y, updated = norm.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return updated["batch_stats"], y

        return apply

    return make


def start():
    return BatchNorm(True).init(jax.random.key(0), np.ones((1, CHANNELS), np.float32))


def normal(rows, mean=0.0, seed=0):
    return (np.random.default_rng(seed).normal(size=(rows, CHANNELS)) + mean).astype(np.float32)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_one_example_a_device_is_enough_and_the_mean_may_be_large(wrapper):
    x = normal(DEVICES, mean=1e4)
    stats, y = run(wrapper, layer(variance="unbiased"), start(), {"x": x})
    assert_allclose(stats["mean"], x.mean(0, dtype=np.float64), rtol=1e-6)
    assert_moments(stats, x, ddof=1, rtol=1e-3)
    assert_allclose(y.std(0), 1, rtol=1e-3)


@functools.partial(jax.jit, static_argnums=0)
def _statistics(over, x, mask):
    apply = jax.vmap(layer(over)(AXIS), axis_name=AXIS, in_axes=(None, 0))
    shards = {"x": x.reshape(DEVICES, -1, CHANNELS), "mask": mask.reshape(DEVICES, -1)}
    return apply(start(), shards)


@settings(max_examples=20)
@given(st.lists(st.integers(0, 4), min_size=DEVICES, max_size=DEVICES).filter(lambda n: sum(n) > 1))
def test_any_division_into_shards_gives_the_statistics_of_the_whole(sizes):
    mask = (np.arange(4)[None] < np.array(sizes)[:, None]).ravel()
    x = normal(DEVICES * 4, mean=np.repeat(np.arange(DEVICES), 4)[:, None])  # shards differ in mean
    x[~mask] = np.nan
    for over in ("axis_name", "average_axis_name"):
        stats, y = _statistics(over, x, mask)
        assert_moments(jax.tree.map(lambda leaf: leaf[0], stats), x[mask], rtol=1e-5, atol=1e-5)
        assert np.isfinite(np.asarray(y).reshape(-1, CHANNELS)[mask]).all()


@pytest.mark.parametrize("wrapper", MAPPED)
@pytest.mark.parametrize(
    "groups", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[0, 7], [1, 2, 3, 4, 5, 6]]], ids=["equal", "unequal"]
)
def test_groups_have_their_own_statistics(wrapper, groups):
    def make(axis_name):
        inner = layer(axis_index_groups=groups)(axis_name)

        def apply(variables, batch):
            stats, y = inner(variables, batch)
            return {}, (jax.tree.map(lambda leaf: leaf[None], stats), y)

        return apply

    x = normal(16, mean=np.arange(16)[:, None])
    _, (stats, _y) = run(wrapper, make, start(), {"x": x})
    for index, group in ((index, one) for one in groups for index in one):
        own = jax.tree.map(lambda leaf, index=index: leaf[index], stats)
        assert_moments(own, x.reshape(DEVICES, 2, CHANNELS)[group], rtol=1e-5, atol=1e-5)


def test_groups_have_to_divide_up_the_axis():
    with pytest.raises(ValueError, match="does not divide the axis 'devices' of 8 devices"):
        run("vmap", layer(axis_index_groups=[[0, 1], [2, 3]]), start(), {"x": normal(16)})
