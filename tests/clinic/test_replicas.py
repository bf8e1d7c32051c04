"""Statistics that replicas kept apart, against NumPy on everything that they saw."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.clinic.statistics import merge_replicas
from bnjax.norms import BatchNorm
from bnjax.train_step import init_state, train_step

pytestmark = pytest.mark.lane
SIZES = (3, 9, 4, 0)  # real examples of each replica


def replicas(sizes, channels=3):
    """What each replica saw, far from one another in mean, and the statistics of it."""
    rng = np.random.default_rng(0)
    seen = [rng.normal(3 * i + 1, 1 + i, (size, channels)) for i, size in enumerate(sizes)]
    nothing = np.full(channels, np.nan)
    leaves = {
        name: np.stack([take(rows, 0) if len(rows) else nothing for rows in seen])
        for name, take in (("mean", np.mean), ("var", np.var))
    }
    return np.concatenate(seen), {"block": {"norm": jax.tree.map(np.float32, leaves)}}


@pytest.mark.parametrize(("sizes", "counts"), [(SIZES, SIZES), ((5, 5, 5), None)])
def test_merged_statistics_are_those_of_all_examples(sizes, counts):
    everything, stats = replicas(sizes)
    merged = merge_replicas(stats, None if counts is None else np.array(counts))["block"]["norm"]
    np.testing.assert_allclose(merged["mean"], everything.mean(0), rtol=1e-6)
    np.testing.assert_allclose(merged["var"], everything.var(0), rtol=1e-6)
    assert merged["var"].dtype == np.float32


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = BatchNorm(momentum=None, use_running_average=not train, name="norm")
        return nn.Dense(3)(norm(x.reshape(x.shape[0], -1)))


def test_a_pmap_loop_whose_norms_do_not_sync():
    """The mean of all batches: the truth is that of all examples that were seen."""
    devices, steps, tx = 8, 3, optax.sgd(0.1)
    rng = np.random.default_rng(1)
    drift = np.arange(devices).reshape(-1, 1, 1, 1, 1)  # each device sees other images
    images = (rng.normal(size=(steps, devices, 4, 2, 2, 1)) + drift).astype(np.float32)
    label = rng.integers(0, 3, (devices, 4))
    state, stats = init_state(Net(), tx, jax.random.key(0), images[0, 0])
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), stats)
    step = partial(train_step, model=Net(), tx=tx, axis_name="devices")
    step = jax.pmap(step, "devices", in_axes=(None, 0, 0), out_axes=(None, 0, None))
    for image in images:
        state, stats, _ = step(state, stats, {"image": image, "label": label})
    merged = merge_replicas(stats)["norm"]
    assert int(merged["count"]) == steps
    # An average of variances leaves out how the means differ from step to step, on each device.
    within = images.astype(np.float64).reshape(steps, devices, 4, 4)
    means = within.mean((0, 2))
    np.testing.assert_allclose(merged["mean"], means.mean(0), rtol=1e-5)
    var = within.var(2).mean((0, 1)) + means.var(0)
    np.testing.assert_allclose(merged["var"], var, rtol=1e-5)


def test_what_does_not_go_together_is_refused():
    _, stats = replicas((2, 2))
    for counts, words in (([1, 2, 3], "must be 2 non-negative numbers"), ([0, 0], "not all 0")):
        with pytest.raises(ValueError, match=words):
            merge_replicas(stats, np.array(counts))
    for other in (jnp.zeros(()), jnp.zeros((3, 1))):
        with pytest.raises(ValueError, match="leading axis with one entry per replica"):
            merge_replicas({**stats, "other": other})
    with pytest.raises(ValueError, match=r"count differs between replicas \(\[4 5\]\)"):
        merge_replicas({**stats, "count": np.array([4, 5])})
    assert merge_replicas({}) == {}
