"""Precise statistics against a forward pass in NumPy and float64."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
from foreign import NETWORKS, drawn
from wrappers import run

from bnjax.clinic import linen
from bnjax.clinic import precise as precise_network
from bnjax.clinic.network import nothing_seen
from bnjax.norms import BatchNorm

RNG = np.random.default_rng(0)
IMAGES = (RNG.random((16, 5, 5, 2)) * [1, 3] + [0.5, -1]).astype(np.float32)
UNEVEN = np.split(IMAGES, [5, 13])  # 5, 8 and 3 images
EPSILON = 1e-3
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)  # says the same in other words


class Net(nn.Module):
    """Three norms behind one another."""

    norm: type | functools.partial = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train, epsilon=EPSILON)
        x = nn.relu(norm(name="first")(nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)))
        x = nn.relu(nn.Dense(7, name="dense")(x.reshape(len(x), -1)))
        x = nn.Dense(5, name="logits")(norm(name="second")(x))
        return norm(name="third")(x)


def variables_of(model):
    return drawn(model, IMAGES[:1])


def in_numpy(params, batches):
    """Returns what each norm is given, as a list with an array [values, channels] for each batch.

    Each batch is normalised by itself.
    """
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    found = {"first": [], "second": [], "third": []}

    def norm(x, name):
        flat = x.reshape(-1, x.shape[-1])
        found[name].append(flat)
        x = (x - flat.mean(0)) / np.sqrt(flat.var(0) + EPSILON)
        return x * weights[name]["scale"] + weights[name]["bias"]

    for x in batches:
        windows = np.lib.stride_tricks.sliding_window_view(np.float64(x), (3, 3), axis=(1, 2))
        x = np.einsum("nhwcij,ijcf->nhwf", windows, weights["conv"]["kernel"])
        x = np.maximum(norm(x + weights["conv"]["bias"], "first"), 0).reshape(len(x), -1)
        x = np.maximum(x @ weights["dense"]["kernel"] + weights["dense"]["bias"], 0)
        x = norm(x, "second") @ weights["logits"]["kernel"] + weights["logits"]["bias"]
        norm(x, "third")
    return found


def truth(params, batches, by, ddof=0):
    """Returns {norm: (mean, var)}: of batches that meet nowhere, or of all images as one batch."""
    found = in_numpy(params, [np.concatenate(batches)] if by == "population" else batches)
    pooled = {name: np.concatenate(values) for name, values in found.items()}
    return {name: (x.mean(0), x.var(0, ddof=ddof)) for name, x in pooled.items()}


def assert_are(stats, wanted):
    """Means to 1e-5 standard deviations, variances to 1e-5 relative."""
    assert set(stats) == set(wanted)
    for name, (mean, var) in wanted.items():
        # A unit that is dead has no variance; what is added to it sets the scale then.
        scale = var + EPSILON
        assert np.max(np.abs(stats[name]["mean"] - mean) / np.sqrt(scale)) < 1e-5, name
        assert np.max(np.abs(stats[name]["var"] - var) / scale) < 1e-5, name


def precise(model, params, batches, batch_stats=None, **options):
    """The statistics alone; others stand in where none are given."""
    if batch_stats is None:
        _, batch_stats = variables_of(model)
    return precise_network(linen(model, params, batch_stats), batches, **options).batch_stats


def as_batches(images):
    return [{"image": image} for image in images]


def padded(images, size=8):
    """The same batches, filled up to one size with what must not count."""
    filled = []
    for image in images:
        rest = size - len(image)
        filling = np.full((rest, *image.shape[1:]), np.nan, np.float32)
        mask = np.arange(size) < len(image)
        order = RNG.permutation(size)
        filled.append({"image": np.concatenate([image, filling])[order], "mask": mask[order]})
    return filled


@pytest.mark.parametrize(
    ("norm", "form", "by"),
    [
        (nn.BatchNorm, padded, "batch"),
        (nn.BatchNorm, padded, "population"),
        (BatchNorm, as_batches, "population"),
        (functools.partial(BatchNorm, variance="unbiased"), as_batches, "batch"),
    ],
)
def test_against_numpy(norm, form, by):
    ddof = int(isinstance(norm, functools.partial))
    model = Net(norm)
    params, stats = variables_of(model)
    wanted = truth(params, UNEVEN, by, ddof)
    assert_are(precise(model, params, form(UNEVEN), stats, by=by), wanted)
    other = truth(params, UNEVEN, {"batch": "population", "population": "batch"}[by], ddof)
    with pytest.raises(AssertionError):  # the two meanings are told apart here
        assert_are({name: {"mean": m, "var": v} for name, (m, v) in other.items()}, wanted)


def test_means_far_from_zero_and_batches_that_can_be_gone_through_once():
    model = Net()
    params, _ = variables_of(model)
    params = {**params, "conv": {**params["conv"], "bias": params["conv"]["bias"] + 300}}
    (mean, var) = truth(params, UNEVEN, "batch")["first"]
    found = precise(model, params, (batch for batch in as_batches(UNEVEN)))["first"]
    # A float32 of 300 is known to 1.5e-5, whatever is done with it.
    np.testing.assert_allclose(found["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(found["var"], var, rtol=1e-3)


@pytest.mark.parametrize("wrapper", ["pmap", "shard_map", SLOW("vmap")])
def test_over_shards_that_hold_different_numbers_of_images(wrapper):
    model = Net()
    params, stats = variables_of(model)
    batches = []
    for images in UNEVEN:  # on eight devices; at least one has no image at all
        places = np.sort(RNG.permutation(14)[: len(images)])
        image = np.full((16, 5, 5, 2), np.nan, np.float32)
        image[places] = images
        batches.append({"image": image, "mask": np.isin(np.arange(16), places)})

    def make(axis_name):
        def both(replicated, sharded):
            params, stats = replicated
            seen = nothing_seen(stats)
            for batch in sharded:
                network = linen(model, params, stats)
                logits, seen = network.observe(seen, batch, mode="batch", axis_name=axis_name)
            return seen, logits

        return both

    seen, _ = run(wrapper, make, (params, stats), batches)
    found = {path[0]: {"mean": m.mean, "var": m.var} for path, m in seen.items()}
    assert_are(found, truth(params, UNEVEN, "batch"))
    assert {float(m.count.min()) for m in seen.values()} == {16.0, 16.0 * 9}


def test_a_norm_that_is_called_twice_has_the_moments_of_both_in_evaluation():
    model, images = NETWORKS["shared"], RNG.random((6, 8, 8, 3)).astype(np.float32)
    params, stats = drawn(model, images[:1])
    batches = padded(np.split(images, [4]), 4)
    found = precise(model, params, batches, stats, by="population")
    _, seen = model.apply(
        {"params": params, "batch_stats": found},
        images,
        train=False,
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
        mutable=["intermediates"],
    )
    (given,) = (np.concatenate(of["__call__"]) for of in seen["intermediates"]["Layer_0"].values())
    stats = found["Layer_0"]["BatchNorm_0"]
    assert len(given) == 12
    np.testing.assert_allclose(stats["mean"], given.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], given.var(0), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_done_is_refused():
    model = Net()
    params, stats = variables_of(model)
    with pytest.raises(ValueError, match="no batch"):
        precise(model, params, [], stats)
    with pytest.raises(ValueError, match="no running statistics"):
        precise(model, params, as_batches(UNEVEN), {})
    with pytest.raises(ValueError, match="several times"):
        precise(model, params, iter(as_batches(UNEVEN)), stats, by="population")
    nobody = [{"image": IMAGES, "mask": np.zeros(16, bool)}]
    with pytest.raises(ValueError, match=r"first has no unmasked inputs"):
        precise(model, params, nobody, stats)


class Spectral(nn.Module):
    """A layer whose weights keep leaves of their own in `batch_stats`."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.SpectralNorm(nn.Dense(4))(x.reshape(len(x), -1), update_stats=train)
        return nn.BatchNorm(use_running_average=not train)(x)


def test_other_leaves_stay_as_they_were():
    model = Spectral()
    params, stats = drawn(model, IMAGES[:1])
    found = precise(model, params, [{"image": IMAGES}], stats)
    own, old = found.pop("BatchNorm_0"), stats.pop("BatchNorm_0")
    assert not np.array_equal(own["mean"], old["mean"])
    jax.tree.map(np.testing.assert_array_equal, found, stats)
