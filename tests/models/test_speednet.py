"""The network of the fast recipes against its definition, in NumPy's float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import conv, float64, norm, windows
from scipy.special import erf

from bnjax.models.convnet import ACTIVATIONS
from bnjax.models.speednet import SpeedNet, dirac, max_pool, unit, whitening
from bnjax.norms import BatchNorm
from bnjax.train_step import init_state, train_step

MEAN, STD, WIDTHS = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), (9, 16)
RNG = np.random.default_rng(0)
# Neighbouring pixels alike, as in photographs.
IMAGES = np.cumsum(RNG.normal(size=(64, 14, 15, 3)), 1).astype(np.float32) / 8
LABEL = np.arange(64) % 10
NORM = partial(BatchNorm, momentum=0.6, epsilon=1e-12, use_scale=False)
MODEL = SpeedNet(norm=NORM, widths=WIDTHS, mean=MEAN, std=STD, activation=ACTIVATIONS["silu"])


def test_the_outputs_of_the_whitening_filters_have_unit_covariance():
    filters = np.asarray(whitening(IMAGES + 1), np.float64)  # of any mean
    assert filters.shape == (2, 2, 3, 24)
    rows = windows(IMAGES.astype(np.float64), 2).reshape(-1, 12)
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    found = np.cov((rows @ filters.reshape(12, 24)[:, :12]).T, bias=True)
    # What is added to the eigenvalues, 5e-4, leaves a little less than 1.
    np.testing.assert_allclose(np.diag(found), eigenvalues / (eigenvalues + 5e-4), rtol=1e-3)
    np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=1e-3)
    np.testing.assert_array_equal(filters[..., 12:], -filters[..., :12])


@pytest.mark.parametrize(("inputs", "outputs"), [(4, 7), (7, 4)])
def test_initial_kernels_copy_channels_or_are_as_torch_draws_them(inputs, outputs):
    kernel = np.asarray(dirac(jax.random.key(0), (3, 3, inputs, outputs)))
    passed = min(inputs, outputs)
    x = RNG.normal(size=(2, 6, 5, inputs))
    y = conv(x, {"kernel": kernel}, edge=1)
    np.testing.assert_allclose(y[..., :passed], x[..., :passed], atol=1e-7)
    large = np.asarray(dirac(jax.random.key(1), (3, 3, 4, 2000)))[..., 4:]
    assert abs(large).max() <= 1 / 6
    assert abs(large.std() - 1 / 6 / 3**0.5) < 0.002
    head = np.asarray(unit(jax.random.key(0), (256, 10)))
    assert abs(head.std(ddof=1) - 1) < 1e-5


@pytest.mark.parametrize("train", [True, False])
def test_a_maximum_cuts_off_what_is_left_over(train):
    x = RNG.normal(size=(2, 7, 9, 3))
    found = max_pool(jnp.asarray(x), 3, train=train)
    assert found.shape == (2, 2, 3, 3)
    np.testing.assert_allclose(found[1, 1, 2], x[1, 3:6, 6:9].max((0, 1)), rtol=1e-6)


def reference(params, stats, x):
    """The logits in evaluation, from the definition."""

    def normed(x, name):
        y = norm(x, params[name], stats[name], 1e-12)
        return y / (1 + np.exp(-y))

    x = conv((x - np.array(MEAN)) / np.array(STD), params["whiten"])
    x = x * (1 + erf(x / 2**0.5)) / 2
    for i in range(len(WIDTHS)):
        x = windows(conv(x, params[f"group{i}_conv0"], edge=1), 2, 2).max((3, 4))
        x = normed(x, f"group{i}_conv0_norm")
        x = normed(conv(x, params[f"group{i}_conv1"], edge=1), f"group{i}_conv1_norm")
    x = windows(x, 3, 3).max((3, 4)).reshape(len(x), -1)
    return x @ params["logits"]["kernel"] / WIDTHS[-1]


def test_the_network_is_its_definition():
    variables = jax.jit(partial(MODEL.init, train=False))(jax.random.key(0), IMAGES)
    update = jax.jit(partial(MODEL.apply, train=True, mutable=["batch_stats"]))
    _, written = update(variables, IMAGES)
    params = jax.tree.map(lambda leaf: leaf + 0.1, variables["params"])  # biases are 0 at first
    found = jax.jit(partial(MODEL.apply, train=False))({"params": params, **written}, IMAGES)
    wanted = reference(*float64((params, written["batch_stats"], IMAGES)))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_the_whitening_is_of_the_images_of_init_and_is_not_trained():
    tx = optax.sgd(0.1)
    state, stats = jax.jit(partial(init_state, MODEL, tx))(jax.random.key(0), IMAGES)
    standard = (IMAGES - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    kernel = state.params["whiten"]["kernel"]
    np.testing.assert_allclose(abs(kernel), abs(whitening(standard)), rtol=1e-3, atol=1e-3)
    batch = {"image": IMAGES, "label": LABEL}
    after, _, _ = jax.jit(partial(train_step, model=MODEL, tx=tx))(state, stats, batch)
    np.testing.assert_array_equal(after.params["whiten"]["kernel"], kernel)
    assert (after.params["whiten"]["bias"][:9] != 0).all()  # those that the first group passes on
