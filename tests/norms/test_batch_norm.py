"""BatchNorm against NumPy in float64, the paper's backward pass and other frameworks' averages."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import assert_moments, start, train
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import SUMS_ONE_BY_ONE
from numpy.testing import assert_allclose, assert_array_equal

from bnjax import compat
from bnjax.norms import BatchNorm
from bnjax.norms.running_average import kept_fraction

pytestmark = pytest.mark.lane

CONVENTIONS = json.loads((Path(__file__).parent / "conventions.json").read_text())


def normal(shape, mean=1.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 2 + mean).astype(np.float32)


BATCHES = [normal((8, 3), seed=seed, mean=seed) for seed in range(4)]


def trained(norm, batches):
    """Returns the last output and the statistics after a step with each batch."""
    variables = start(norm, batches[0])
    for batch in batches:
        y, variables = train(norm, variables, batch)
    return y, variables["batch_stats"]


@settings(max_examples=8)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(2, 9),
    st.floats(0, 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["biased", "unbiased"]),
)
def test_masked_statistics_of_any_shape(inner, examples, momentum, seed, variance):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, *inner)).astype(np.float32) * 3 - 1
    mask = rng.random(examples) < 0.6
    norm = BatchNorm(momentum=momentum, variance=variance, use_scale=False, use_bias=False)
    y, updated = train(norm, start(norm, x), x, mask)
    real = x[mask].astype(np.float64).reshape(-1, x.shape[-1])
    mean, var = np.zeros(x.shape[-1]), np.ones(x.shape[-1])
    if len(real) >= 2:
        mean = (1 - momentum) * real.mean(0)
        var = momentum + (1 - momentum) * real.var(0, ddof=variance == "unbiased")
    assert_allclose(updated["batch_stats"]["mean"], mean, rtol=1e-4, atol=1e-5)
    assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-4, atol=1e-5)
    assert np.isfinite(y).all()
    assert (y[~mask] == 0).all()  # the bias


@pytest.mark.parametrize(
    "shape", [(64, 5), pytest.param((32, 13, 13, 4), marks=SUMS_ONE_BY_ONE), (20_000, 3)]
)
def test_variance_of_values_far_from_zero(shape):
    x = (np.random.default_rng(0).normal(size=shape) + 1e4).astype(np.float32)
    y, stats = trained(BatchNorm(momentum=0.0), [x])
    assert_moments(stats, x, rtol=2e-5)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes, dtype=np.float64), x.var(axes, dtype=np.float64)
    # float32 resolves 1e-3 at 1e4.
    assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), atol=3e-3)


@pytest.mark.parametrize("real", [8, 5])
def test_gradients_are_the_closed_form(real):
    with compat.enable_x64(True):
        rng, mask = np.random.default_rng(1), (np.arange(8.0) < real).reshape(8, 1, 1, 1)
        x, dy = rng.normal(size=(8, 3, 3, 4)) * 3 + 1, rng.normal(size=(8, 3, 3, 4)) * mask
        params, epsilon = {"scale": rng.normal(size=4), "bias": rng.normal(size=4)}, 1e-3
        norm = BatchNorm(use_running_average=False, epsilon=epsilon, param_dtype=jnp.float64)
        stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def gradient(x, params):
            variables = {"params": params, "batch_stats": stats}
            options = {"mutable": ["batch_stats"], "mask": None if real == 8 else mask}
            return jnp.sum(norm.apply(variables, x, **options)[0] * dy)

        dx, dparams = gradient(x, params)
        # Ioffe & Szegedy (2015), section 3, with sums over the m real values of a channel.
        m, axes = 9 * real, (0, 1, 2)
        mean = (x * mask).sum(axes) / m
        std = np.sqrt(((x - mean) ** 2 * mask).sum(axes) / m + epsilon)
        x_hat = (x - mean) / std
        dscale, dbias = (dy * x_hat).sum(axes), dy.sum(axes)
        expected = params["scale"] / std * (dy - (dbias + x_hat * dscale) / m * mask)
        assert_allclose(dx, expected, rtol=0, atol=1e-10)
        assert_allclose(dparams["scale"], dscale, rtol=0, atol=1e-10)
        assert_allclose(dparams["bias"], dbias, rtol=0, atol=1e-10)


def test_forward_mode_and_second_derivatives():
    with compat.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 2)))
        norm = BatchNorm(use_scale=False, use_bias=False)
        variables = start(norm, x)

        def ours(x):
            return jnp.sum(train(norm, variables, x)[0] ** 3)

        def plain(x):
            deviation = x - x.mean(0, keepdims=True)
            return jnp.sum((deviation / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)) ** 3)

        direction = jnp.cos(jnp.arange(10.0)).reshape(5, 2)
        _, found = jax.jvp(ours, (x,), (direction,))
        assert_allclose(found, jnp.vdot(jax.grad(plain)(x), direction))
        assert_allclose(*(jax.jit(jax.hessian(of))(x) for of in (ours, plain)), atol=1e-10)


def test_statistics_are_at_least_float32_and_float64_stays_float64():
    x = normal((64, 4), mean=20).astype(jnp.bfloat16)
    norm = BatchNorm(momentum=0.0, dtype=jnp.bfloat16)
    # Even if the stored variables are bfloat16.
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), start(norm, x))
    y, updated = train(norm, variables, x)
    exact = np.asarray(x).astype(np.float64)
    assert (y.dtype, updated["batch_stats"]["var"].dtype) == (jnp.bfloat16, jnp.float32)
    assert_allclose(updated["batch_stats"]["var"], exact.var(0), rtol=1e-5)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    assert_allclose(np.asarray(y, np.float64), expected, rtol=2.0**-8, atol=1e-5)
    with compat.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(32, 3)) + 1e4
        _, stats = trained(BatchNorm(momentum=0.0), [x])
        assert stats["var"].dtype == jnp.float64
        assert_allclose(stats["var"], x.var(0), rtol=1e-11)


@pytest.mark.parametrize("framework", CONVENTIONS["frameworks"])
@pytest.mark.parametrize("size", CONVENTIONS["batches"])
def test_conventions_of_other_frameworks(framework, size):
    variance = "unbiased" if framework in ("torch", "tensorflow fused") else "biased"
    momentum, epsilon = CONVENTIONS["kept"], CONVENTIONS["epsilon"]
    norm = BatchNorm(momentum=momentum, epsilon=epsilon, variance=variance)
    batches = np.array(CONVENTIONS["batches"][size], np.float32)
    y, stats = trained(norm, batches)
    expected = CONVENTIONS["frameworks"][framework]["sizes"][size]
    assert_allclose(stats["mean"], expected["mean"], atol=2e-6)
    assert_allclose(stats["var"], expected["var"], atol=4e-6)
    assert_allclose(y[0], expected["last_output_of_first"], atol=1e-5)


@pytest.mark.parametrize(
    ("momentum", "debias", "weights"),
    [
        (0.9, True, 0.9 ** np.arange(3, -1, -1) / (0.9 ** np.arange(4)).sum()),
        (0.0, True, [0, 0, 0, 1]),
        (None, False, [1 / 4] * 4),
        (None, True, [1 / 4] * 4),
        (lambda step: step / 4, False, np.array([1 * 2 * 3, 3 * 2 * 3, 2 * 4 * 3, 4 * 4]) / 64),
    ],
)
def test_the_averages_are_weighted_means_of_the_batches(momentum, debias, weights):
    with compat.enable_x64(True):
        batches = [batch.astype(np.float64) for batch in BATCHES]
        _, stats = trained(BatchNorm(momentum=momentum, debias=debias), batches)
        for name, of in (("mean", np.mean), ("var", np.var)):
            expected = weights @ np.array([of(batch, axis=0) for batch in batches])
            # The logarithm of a momentum of 0 is cut off at 1e-6.
            assert_allclose(stats[name], expected, rtol=1e-12 if momentum else 1e-5)
        assert (stats["count"], stats["count"].dtype) == (4, jnp.int32)


@given(st.floats(0, 1) | st.just(None), st.integers(0, 100_000))
def test_what_is_kept_is_a_fraction_and_nothing_at_first(momentum, count):
    assert 0 <= float(kept_fraction(momentum, True, count)) <= (momentum or 1) + 1e-6
    # So a constant stream gives its own statistics from the first update on.
    assert kept_fraction(momentum, True, 0) == 0
    assert kept_fraction(lambda step: 0.99 - 0.1 / (step + 1), True, 0) == 0


def test_averages_rounded_to_bfloat16_lose_small_updates():
    """Compared with NumPy, which rounds to bfloat16 after each update."""
    norm, rng = BatchNorm(momentum=0.99, average_dtype=jnp.bfloat16), np.random.default_rng(0)
    batches = rng.normal(3, 1, (60, 64, 4)).astype(np.float32)
    _, stats = trained(norm, batches)
    for name, average in (("mean", np.zeros(4)), ("var", np.ones(4))):
        for new in getattr(batches.astype(np.float64), name)(1):
            average = (0.99 * average + 0.01 * new).astype(jnp.bfloat16).astype(np.float64)
        assert stats[name].dtype == jnp.float32
        # A number between two of bfloat16 may be rounded the other way: one unit, 2**-8.
        assert_allclose(stats[name], average, rtol=3 * 2**-8)
        assert_array_equal(stats[name], stats[name].astype(jnp.bfloat16))
    assert (stats["mean"] != trained(BatchNorm(momentum=0.99), batches)[1]["mean"]).all()


@pytest.mark.parametrize("statistics", [None, "batch", "running"])
@pytest.mark.parametrize("update", [None, True, False])
@pytest.mark.parametrize("evaluates", [True, False])
def test_which_statistics_normalise_and_whether_they_are_updated(statistics, update, evaluates):
    norm, x = BatchNorm(momentum=0.5, statistics=statistics, update_average=update), BATCHES[1]
    call = functools.partial(norm.apply, start(norm, x), x, use_running_average=evaluates)
    y, updated = call(mutable=["batch_stats"])
    by_batch = (statistics or ("running" if evaluates else "batch")) == "batch"
    updates = not evaluates if update is None else update
    mean = x.mean(0, dtype=np.float64)
    assert_allclose(y.mean(0), 0 if by_batch else mean, atol=1e-4)
    assert_allclose(updated["batch_stats"]["mean"], 0.5 * mean * updates, atol=1e-5)
    if evaluates:
        assert_array_equal(call(), y)  # an immutable collection is not updated


def test_scale_and_bias_can_be_frozen():
    norm = BatchNorm(train_affine=False)
    variables = start(norm, BATCHES[0])

    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(params, x):
        return jnp.sum(jnp.sin(train(norm, variables | {"params": params}, x)[0]))

    dparams, dx = gradient(variables["params"], BATCHES[0])
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(dparams))
    assert (dx != 0).any()


def test_groups_with_remat_have_the_gradient_without_it():
    groups = [[0, 1], [2, 3]]
    norm = BatchNorm(use_running_average=False, axis_name="d", axis_index_groups=groups)
    x = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    variables = start(BatchNorm(), x[0])

    def loss(x):
        return jnp.sin(norm.apply(variables, x, mutable=["batch_stats"])[0]).sum()

    losses = (loss, jax.checkpoint(loss))
    plain, again = (jax.jit(jax.vmap(jax.grad(f), axis_name="d"))(x) for f in losses)
    assert_allclose(again, plain, rtol=1e-5, atol=1e-6)


COUNTED, BY_CHANNEL = {"debias": True}, {"mask": np.array([[True, False, True]] * 8)}


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({}, {"x": np.ones((1, 3))}, r"\(1, 3\).* fewer than 2 values per channel.*Use"),
        ({"axis_name": "b"}, {}, r"axis_name = 'b', but there is no mapped axis 'b' here.* Run it"),
        ({}, {"mask": np.ones(5, bool)}, r"mask of shape \(5,\) does not fit .* \(8, 3\).*\[8\]"),
        ({}, {"mask": np.ones((8, 2), bool)}, r"mask of shape \(8, 2\) does not fit"),
        (COUNTED, BY_CHANNEL | {"start": {}}, "no `count` next to `mean` and `var`"),
        (COUNTED, BY_CHANNEL, "one count of updates for all channels"),
        ({"momentum": 1.5}, {}, "momentum = 1.5 is invalid.*fraction of the old average"),
        ({"variance": "sample"}, {}, "variance = 'sample'.*'biased', 'unbiased'"),
        ({"statistics": "moving"}, {}, "statistics = 'moving'.*'batch', 'running'"),
        ({"axis": 5}, {}, "axis = 5"),
        ({}, {"x": np.ones((2, 3), np.complex64)}, "real numbers"),
    ],
)
def test_errors_say_what_to_do(options, call, message):
    call = {"x": BATCHES[0], "start": {"debias": "debias" in options}} | call
    variables = start(BatchNorm(**call.pop("start")), BATCHES[0])
    with pytest.raises((ValueError, NameError), match=message):
        train.__wrapped__(BatchNorm(**options), variables, **call)


def test_initialisation_needs_no_axis_and_no_second_example():
    norm = BatchNorm(axis_name="nowhere")
    norm.init(jax.random.key(0), np.ones((1, 3), np.float32), use_running_average=False)
