"""Precise and merged statistics, against NumPy and float64."""

import collections
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from foreign import NETWORKS, drawn
from numpy_network import EPSILON, IMAGES, Net, Tiny, in_numpy, padded
from seen import assert_moments
from wrappers import run
from zoo.kit import precise

from bnjax import clinic
from bnjax.clinic.network import nothing_seen
from bnjax.clinic.statistics import merge_replicas
from bnjax.norms import BatchNorm
from bnjax.train_step import init_state, train_step

UNEVEN = np.split(IMAGES, [5, 13])  # 5, 8 and 3 images
PLAIN = [{"image": image} for image in UNEVEN]
PADDED = [*map(padded, UNEVEN)]
UNBIASED = functools.partial(BatchNorm, variance="unbiased")
PARAMS, STATS = drawn(Net(), IMAGES[:1])


def truth(by, *, params=PARAMS, ddof=0, keep=0.0):
    """Returns {norm: (mean, var)} over separate batches, or over all images as one batch."""
    found = collections.defaultdict(list)

    def mixed(name, *own):
        old = (np.float64(STATS[name][leaf]) for leaf in ("mean", "var"))
        return [keep * one + (1 - keep) * other for one, other in zip(old, own, strict=True)]

    def moments(name, x):
        found[name].append(x)
        if by == "population":
            return mixed(name, x.mean(0), x.var(0, ddof=ddof))
        return x.mean(0), x.var(0)

    for images in [IMAGES] if by == "population" else UNEVEN:
        in_numpy(params, images, moments)
    pooled = {name: np.concatenate(values) for name, values in found.items()}
    return {name: mixed(name, x.mean(0), x.var(0, ddof=ddof)) for name, x in pooled.items()}


def assert_are(stats, wanted):
    """Means to 1e-5 standard deviations, variances to 1e-5 relative."""
    assert set(stats) == set(wanted)
    for name, (mean, var) in wanted.items():
        # A dead unit has variance 0, so its tolerance is relative to epsilon.
        scale = var + EPSILON
        assert np.max(np.abs(stats[name]["mean"] - mean) / np.sqrt(scale)) < 1e-5, name
        assert np.max(np.abs(stats[name]["var"] - var) / scale) < 1e-5, name


def stats_of(batches, model=None, params=PARAMS, stats=STATS, **options):
    return precise(clinic.linen(model or Net(), params, stats), batches, **options).batch_stats


@pytest.mark.parametrize("by", ["batch", "population"])
@pytest.mark.parametrize(
    ("norm", "batches", "keep"),
    [
        *((nn.BatchNorm, PADDED, keep) for keep in (0.0, 16 / (16 + 25), 1.0)),
        (UNBIASED, PLAIN, 0.0),
    ],
)
def test_against_numpy(norm, batches, keep, by):
    ddof = int(norm is UNBIASED)
    wanted = truth(by, ddof=ddof, keep=keep)
    assert_are(stats_of(batches, Net(norm), by=by, keep=keep), wanted)
    other = truth({"batch": "population", "population": "batch"}[by], ddof=ddof)
    with pytest.raises(AssertionError):  # the two meanings are told apart here
        assert_are({name: {"mean": m, "var": v} for name, (m, v) in other.items()}, wanted)


def test_means_far_from_zero_and_batches_that_can_be_gone_through_once():
    params = {**PARAMS, "conv": {**PARAMS["conv"], "bias": PARAMS["conv"]["bias"] + 300}}
    (mean, var) = truth("batch", params=params)["first"]
    found = stats_of(iter(PLAIN), params=params)["first"]
    # A float32 of 300 is known to 1.5e-5, whatever is done with it.
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(found["var"], var, rtol=1e-3)


@pytest.mark.parametrize(
    "wrapper", ["pmap", "shard_map", pytest.param("vmap", marks=pytest.mark.slow)]
)
def test_over_shards_that_hold_different_numbers_of_images(wrapper):
    batches = [padded(images, 16) for images in UNEVEN]  # on eight devices; one has no image at all

    def make(axis_name):
        def both(network, sharded):
            seen = nothing_seen(network.batch_stats)
            for batch in sharded:
                logits, seen = network.observe(seen, batch, mode="batch", axis_name=axis_name)
            return seen, logits

        return both

    seen, _ = run(wrapper, make, clinic.linen(Net(), PARAMS, STATS), batches)
    assert_are(
        {path[0]: {"mean": m.mean, "var": m.var} for path, m in seen.items()}, truth("batch")
    )
    assert {float(m.count.min()) for m in seen.values()} == {16.0, 16.0 * 9}


def test_a_norm_that_is_called_twice_has_the_moments_of_both_in_evaluation():
    model, images = NETWORKS["shared"], np.random.default_rng(0).random((6, 8, 8, 3), np.float32)
    params, stats = drawn(model, images[:1])
    batches = [padded(images[:4], 4), padded(images[4:], 4)]
    found = stats_of(batches, model, params, stats, by="population")
    _, seen = model.apply(
        {"params": params, "batch_stats": found},
        images,
        train=False,
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
        mutable=["intermediates"],
    )
    (given,) = (np.concatenate(of["__call__"]) for of in seen["intermediates"]["Layer_0"].values())
    assert len(given) == 12
    assert_moments(found["Layer_0"]["BatchNorm_0"], given, rtol=1e-4, atol=1e-5)


def called(call):
    """A network of one norm, called by a function of (norm, images, train)."""
    variables = nn.BatchNorm().init(jax.random.key(0), IMAGES, use_running_average=True)
    return clinic.linen(nn.BatchNorm(), **variables, call=call)


def test_moments_of_bfloat16_inputs_are_float32():
    def call(norm, x, train):
        return norm(x.astype(jnp.bfloat16), not train).mean((1, 2))

    stats = precise(called(call), PADDED).batch_stats
    assert_moments(stats, IMAGES.astype(jnp.bfloat16), rtol=1e-6)


def test_padding_is_refused_where_a_norm_cannot_tell_examples_apart():
    def call(norm, x, train):
        return norm(x.reshape(-1, 2), not train).reshape(len(x), -1)

    with pytest.raises(ValueError, match="does not have the 8 examples along its first axis"):
        precise(called(call), PADDED)


@pytest.mark.parametrize(
    ("batches", "options", "words"),
    [
        ([], {}, "no batch"),
        (PLAIN, {"stats": {}}, "no running statistics"),
        (iter(PLAIN), {"by": "population"}, "several times"),
        (PLAIN, {"keep": 1.1}, "from 0 to 1"),
        ([padded(IMAGES[:0])], {}, "first has no unmasked inputs"),
    ],
)
def test_what_cannot_be_done_is_refused(batches, options, words):
    with pytest.raises(ValueError, match=words):
        stats_of(batches, **options)


class Spectral(nn.Module):
    """A layer whose weights keep leaves of their own in `batch_stats`."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.SpectralNorm(nn.Dense(4))(x.reshape(len(x), -1), update_stats=train)
        return nn.BatchNorm(use_running_average=not train)(x)


def test_other_leaves_stay_as_they_were():
    params, stats = drawn(Spectral(), IMAGES[:1])
    mended = precise(clinic.linen(Spectral(), params, stats), [{"image": IMAGES}])
    assert mended.params is params
    found = dict(mended.batch_stats)
    own, old = found.pop("BatchNorm_0"), stats.pop("BatchNorm_0")
    assert not np.array_equal(own["mean"], old["mean"])
    jax.tree.map(np.testing.assert_array_equal, found, stats)


SIZES = (3, 9, 4, 0)  # real examples of each replica


def replicas(sizes, channels=3):
    """Returns the inputs of each replica, whose means are far apart, and their statistics."""
    rng = np.random.default_rng(0)
    seen = [rng.normal(3 * i + 1, 1 + i, (size, channels)) for i, size in enumerate(sizes)]
    nothing = np.full(channels, np.nan)
    leaves = {
        name: np.stack([take(rows, 0) if len(rows) else nothing for rows in seen])
        for name, take in (("mean", np.mean), ("var", np.var))
    }
    return np.concatenate(seen), {"block": {"norm": jax.tree.map(np.float32, leaves)}}


@pytest.mark.lane
@pytest.mark.parametrize(("sizes", "counts"), [(SIZES, SIZES), ((5, 5, 5), None)])
def test_merged_statistics_are_those_of_all_examples(sizes, counts):
    everything, stats = replicas(sizes)
    merged = merge_replicas(stats, None if counts is None else np.array(counts))["block"]["norm"]
    assert_moments(merged, everything, rtol=1e-6)
    assert merged["var"].dtype == np.float32


@pytest.mark.lane
def test_a_pmap_loop_whose_norms_do_not_sync():
    """The norms average over the steps, and `merge_replicas` merges over the devices."""
    devices, steps, tx = 8, 3, optax.sgd(0.1)
    model = Tiny(functools.partial(BatchNorm, momentum=None))
    rng = np.random.default_rng(1)
    drift = np.arange(devices).reshape(-1, 1, 1, 1, 1)  # each device sees other images
    images = (rng.normal(size=(steps, devices, 4, 2, 2, 1)) + drift).astype(np.float32)
    label = rng.integers(0, 3, (devices, 4))
    state, stats = init_state(model, tx, jax.random.key(0), images[0, 0])
    stats = jax.tree.map(lambda leaf: jnp.stack([leaf] * devices), stats)
    step = functools.partial(train_step, model=model, tx=tx, axis_name="devices")
    step = jax.pmap(step, "devices", in_axes=(None, 0, 0), out_axes=(None, 0, None))
    for image in images:
        state, stats, _ = step(state, stats, {"image": image, "label": label})
    merged = merge_replicas(stats)["norm"]
    assert int(merged["count"]) == steps
    # The mean of the variances omits the differences between the means of the steps.
    within = images.astype(np.float64).reshape(steps, devices, 4, 4)
    means = within.mean((0, 2))
    np.testing.assert_allclose(merged["mean"], means.mean(0), rtol=1e-5)
    var = within.var(2).mean((0, 1)) + means.var(0)
    np.testing.assert_allclose(merged["var"], var, rtol=1e-5)


@pytest.mark.lane
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
