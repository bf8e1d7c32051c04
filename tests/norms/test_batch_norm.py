"""BatchNorm against NumPy in float64, the paper's backward pass and other frameworks' averages."""

import functools
import json
import operator
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import SUMS_ONE_BY_ONE

from bnjax import compat
from bnjax.norms import BatchNorm
from bnjax.norms.running_average import (
    kept_fraction,
)

pytestmark = pytest.mark.lane

CONVENTIONS = json.loads((Path(__file__).parent / "conventions.json").read_text())


def normal(shape, mean=1.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 2 + mean).astype(np.float32)


def start(norm, x):
    return norm.init(jax.random.key(0), x, use_running_average=True)


@functools.partial(jax.jit, static_argnums=0)
def train(norm, variables, x, mask=None):
    y, updated = norm.apply(
        variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
    )
    return y, {**variables, **updated}


def stats_after(norm, batches, masks=None):
    variables = start(norm, batches[0])
    for batch, mask in zip(batches, masks or [None] * len(batches), strict=True):
        _, variables = train(norm, variables, batch, mask)
    return variables["batch_stats"]


def test_output_and_statistics_are_those_of_numpy():
    norm, x = BatchNorm(momentum=0.75, epsilon=1e-3), normal((6, 5, 4, 3))
    variables = start(norm, x)
    variables["params"] = {"scale": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array([0.0, -1.0, 5.0])}
    y, updated = train(norm, variables, x)
    x64 = x.astype(np.float64)
    mean, var = x64.mean((0, 1, 2)), x64.var((0, 1, 2))
    expected = (x64 - mean) / np.sqrt(var + 1e-3) * [1, 2, 3] + [0, -1, 5]
    np.testing.assert_allclose(y, expected, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(updated["batch_stats"]["mean"], 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], 0.75 + 0.25 * var, rtol=1e-5)
    evaluated = norm.apply(updated, x, use_running_average=True)
    expected = (x64 - 0.25 * mean) / np.sqrt(0.75 + 0.25 * var + 1e-3) * [1, 2, 3] + [0, -1, 5]
    np.testing.assert_allclose(evaluated, expected, atol=1e-6 * np.abs(expected).max())


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
    initial = {"mean": np.zeros(x.shape[-1:], np.float32), "var": np.ones(x.shape[-1:], np.float32)}
    y, updated = train(norm, {"batch_stats": initial}, x, mask)
    real = x[mask].astype(np.float64).reshape(-1, x.shape[-1])
    mean, var = np.zeros(x.shape[-1]), np.ones(x.shape[-1])
    if len(real) >= 2:
        mean = (1 - momentum) * real.mean(0)
        var = momentum + (1 - momentum) * real.var(0, ddof=variance == "unbiased")
    np.testing.assert_allclose(updated["batch_stats"]["mean"], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, rtol=1e-4, atol=1e-5)
    assert np.isfinite(y).all()


@pytest.mark.parametrize(
    "shape", [(64, 5), pytest.param((32, 13, 13, 4), marks=SUMS_ONE_BY_ONE), (20_000, 3)]
)
def test_variance_of_values_far_from_zero(shape):
    x = (np.random.default_rng(0).normal(size=shape) + 1e4).astype(np.float32)
    y, updated = train(BatchNorm(momentum=0.0), start(BatchNorm(), x), x)
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes, dtype=np.float64), x.var(axes, dtype=np.float64)
    np.testing.assert_allclose(updated["batch_stats"]["var"], var, rtol=2e-5)
    np.testing.assert_allclose(
        y, (x - mean) / np.sqrt(var + 1e-5), atol=3e-3
    )  # float32 resolves 1e-3 at 1e4


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_the_closed_form(masked):
    with compat.enable_x64(True):
        rng = np.random.default_rng(1)
        real = (np.arange(8) < (5 if masked else 8)).astype(float).reshape(8, 1, 1, 1)
        x, dy = rng.normal(size=(8, 3, 3, 4)) * 3 + 1, rng.normal(size=(8, 3, 3, 4)) * real
        scale, bias, epsilon = rng.normal(size=4), rng.normal(size=4), 1e-3
        norm = BatchNorm(use_running_average=False, epsilon=epsilon, param_dtype=jnp.float64)
        stats = {"mean": jnp.zeros(4), "var": jnp.ones(4)}

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def gradient(x, params):
            variables = {"params": params, "batch_stats": stats}
            y, _ = norm.apply(variables, x, mask=real if masked else None, mutable=["batch_stats"])
            return jnp.sum(y * dy)

        dx, dparams = gradient(x, {"scale": scale, "bias": bias})
        # Ioffe & Szegedy (2015), section 3, with sums over the m real values of a channel.
        m, axes = 9 * real.sum(), (0, 1, 2)
        mean = (x * real).sum(axes) / m
        var = ((x - mean) ** 2 * real).sum(axes) / m
        std = np.sqrt(var + epsilon)
        dx_hat = dy * scale
        dvar = (dx_hat * (x - mean) * -0.5 * std**-3).sum(axes)
        dmean = (-dx_hat / std).sum(axes) + dvar * (-2 * (x - mean) * real).sum(axes) / m
        expected = dx_hat / std + (dvar * 2 * (x - mean) / m + dmean / m) * real
        dscale = (dy * (x - mean) / std).sum(axes)
        np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(dparams["scale"], dscale, rtol=0, atol=1e-10)
        np.testing.assert_allclose(dparams["bias"], dy.sum(axes), rtol=0, atol=1e-10)


def test_forward_mode_and_second_derivatives():
    with compat.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 2)))
        norm = BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
        variables = {"batch_stats": {"mean": jnp.zeros(2), "var": jnp.ones(2)}}

        def ours(x):
            return jnp.sum(norm.apply(variables, x, mutable=["batch_stats"])[0] ** 3)

        def plain(x):
            return jnp.sum(
                ((x - x.mean(0, keepdims=True)) / jnp.sqrt(x.var(0, keepdims=True) + 1e-5)) ** 3
            )

        direction = jnp.cos(jnp.arange(10.0)).reshape(5, 2)
        np.testing.assert_allclose(
            jax.jit(jax.jvp, static_argnums=0)(ours, (x,), (direction,))[1],
            jnp.vdot(jax.grad(plain)(x), direction),
        )
        np.testing.assert_allclose(
            jax.jit(jax.hessian(ours))(x), jax.jit(jax.hessian(plain))(x), atol=1e-10
        )


def test_statistics_are_at_least_float32():
    x = normal((64, 4), mean=20).astype(jnp.bfloat16)
    norm = BatchNorm(momentum=0.0, dtype=jnp.bfloat16)
    variables = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), start(norm, x)
    )  # even where someone stored less
    y, updated = train(norm, variables, x)
    exact = np.asarray(x).astype(np.float64)
    assert y.dtype == jnp.bfloat16
    assert updated["batch_stats"]["var"].dtype == jnp.float32
    np.testing.assert_allclose(updated["batch_stats"]["var"], exact.var(0), rtol=1e-5)
    evaluated = norm.apply(updated, x, use_running_average=True)
    expected = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(
        np.asarray(evaluated).astype(np.float64), expected, rtol=2.0**-8, atol=1e-5
    )  # rounded once


def test_float64_stays_float64():
    with compat.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 3)) + 1e4)
        stats = stats_after(BatchNorm(momentum=0.0), [x])
        assert stats["var"].dtype == jnp.float64
        np.testing.assert_allclose(stats["var"], np.asarray(x).var(0), rtol=1e-11)


@pytest.mark.parametrize("framework", CONVENTIONS["frameworks"])
@pytest.mark.parametrize("size", CONVENTIONS["batches"])
def test_conventions_of_other_frameworks(framework, size):
    variance = {
        "torch": "unbiased",
        "tensorflow fused": "unbiased",
        "tensorflow not fused": "biased",
        "keras": "biased",
    }[framework]
    norm = BatchNorm(
        momentum=CONVENTIONS["kept"], epsilon=CONVENTIONS["epsilon"], variance=variance
    )
    batches = np.array(CONVENTIONS["batches"][size], np.float32)
    variables = start(norm, batches[0])
    for batch in batches:
        y, variables = train(norm, variables, batch)
    expected = CONVENTIONS["frameworks"][framework]["sizes"][size]
    np.testing.assert_allclose(variables["batch_stats"]["mean"], expected["mean"], atol=2e-6)
    np.testing.assert_allclose(variables["batch_stats"]["var"], expected["var"], atol=4e-6)
    np.testing.assert_allclose(y[0], expected["last_output_of_first"], atol=1e-5)


BATCHES = [normal((8, 3), seed=seed, mean=seed) for seed in range(4)]
MEANS = np.array([batch.mean(0, dtype=np.float64) for batch in BATCHES])


def test_debias_gives_powers_of_the_momentum_as_weights():
    stats = stats_after(BatchNorm(momentum=0.9, debias=True), BATCHES)
    weights = 0.9 ** np.arange(3, -1, -1)
    np.testing.assert_allclose(stats["mean"], weights @ MEANS / weights.sum(), rtol=1e-5)
    assert stats["count"] == 4
    assert stats["count"].dtype == jnp.int32


def test_no_momentum_gives_the_mean_of_all_batches():
    np.testing.assert_allclose(
        stats_after(BatchNorm(momentum=None), BATCHES)["mean"], MEANS.mean(0), rtol=1e-5
    )


def test_momentum_may_follow_the_steps():
    stats = stats_after(BatchNorm(momentum=lambda step: step / 4), BATCHES)
    expected = np.zeros(3)
    for step, mean in enumerate(MEANS):
        expected = step / 4 * expected + (1 - step / 4) * mean
    np.testing.assert_allclose(stats["mean"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "momentum", [0.0, 0.5, 0.99, 0.9999, None, lambda step: 0.99 - 0.1 / (step + 1)]
)
def test_debias_is_exact_on_a_constant_stream_from_the_first_step(momentum):
    x = normal((8, 3), mean=5)
    for updates in (1, 3):
        stats = stats_after(BatchNorm(momentum=momentum, debias=True), [x] * updates)
        np.testing.assert_allclose(stats["mean"], x.mean(0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(stats["var"], x.var(0, dtype=np.float64), rtol=2e-6)


@given(st.floats(0, 1), st.integers(0, 100_000))
def test_what_is_kept_is_a_fraction(momentum, count):
    kept = float(kept_fraction(momentum, True, count))
    assert 0 <= kept <= momentum + 1e-6


def test_count_exists_only_where_it_is_needed():
    x = BATCHES[0]
    for options, counted in (
        ({}, False),
        ({"momentum": None}, True),
        ({"debias": True}, True),
        ({"momentum": lambda step: 0.5}, True),
    ):
        assert ("count" in start(BatchNorm(**options), x)["batch_stats"]) == counted


def test_averages_without_count_are_not_thrown_away_in_silence():
    x = BATCHES[0]
    variables = start(BatchNorm(), x)
    with pytest.raises(ValueError, match="no `count` next to `mean` and `var`"):
        train(BatchNorm(debias=True), variables, x)
    counted = {**variables, "batch_stats": {**variables["batch_stats"], "count": jnp.int32(0)}}
    _, updated = train(BatchNorm(debias=True), counted, x)
    np.testing.assert_allclose(updated["batch_stats"]["mean"], MEANS[0], rtol=1e-5)


def test_masks_that_leave_little_do_not_blow_up_deep_networks():
    """Where the variance is 0 each layer divides by sqrt(epsilon); twenty would pass float32."""

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            bias = nn.initializers.constant(0.1)
            for _ in range(20):
                norm = BatchNorm(use_running_average=False, bias_init=bias)
                x = norm(nn.Dense(8)(x), mask=mask)
            return x

    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    variables = jax.jit(Deep().init)(jax.random.key(0), x, np.ones(4, bool))

    @jax.jit
    @jax.grad
    def gradient(params, mask):
        y, _ = Deep().apply({**variables, "params": params}, x, mask, mutable=["batch_stats"])
        return jnp.where(mask[:, None], jnp.square(y), 0).sum()

    for real in range(3):
        found = gradient(variables["params"], np.arange(4) < real)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_nan_in_padding_does_not_reach_the_scale_of_a_frozen_layer():
    norm = BatchNorm(use_running_average=False, statistics="running", update_average=False)
    x, mask = (
        np.array([[1.0, 2.0], [3.0, 4.0], [np.nan, np.nan]], np.float32),
        np.array([True, True, False]),
    )
    variables = start(BatchNorm(), x[:2])

    def loss(params):
        return norm.apply({**variables, "params": params}, x, mask=mask)[:2].sum()

    np.testing.assert_allclose(jax.grad(loss)(variables["params"])["scale"], [4.0, 6.0], rtol=1e-4)


def test_low_precision_padding_stays_finite():
    norm = BatchNorm(dtype=jnp.float16)
    x = jnp.full((4, 2), 300, jnp.float16)
    y, _ = train(norm, start(norm, x), x, np.zeros(4, bool))
    assert np.isfinite(y).all()


def test_groups_under_remat_have_the_gradient_without_it():
    groups = [[0, 1], [2, 3]]
    norm = BatchNorm(use_running_average=False, axis_name="d", axis_index_groups=groups)
    x = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    variables = start(BatchNorm(), x[0])

    def loss(x):
        return jnp.sin(norm.apply(variables, x, mutable=["batch_stats"])[0]).sum()

    plain, again = (
        jax.jit(jax.vmap(jax.grad(f), axis_name="d"))(x) for f in (loss, jax.checkpoint(loss))
    )
    np.testing.assert_allclose(again, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("norm", "x", "mask", "said"),
    [
        (BatchNorm(axis=5), np.ones((2, 3, 4)), None, "axis = 5"),
        (BatchNorm(), np.ones((2, 3), np.complex64), None, "real numbers"),
        (
            BatchNorm(debias=True),
            np.ones((4, 2), np.float32),
            np.array([[True, False]] * 4),
            "one count of updates for all channels",
        ),
    ],
)
def test_what_has_no_meaning_is_refused(norm, x, mask, said):
    with pytest.raises(ValueError, match=said):
        norm.init_with_output(jax.random.key(0), x, use_running_average=False, mask=mask)


def test_the_mean_of_all_batches_is_as_exact_as_float64():
    with compat.enable_x64(True):
        norm = BatchNorm(momentum=None)
        batches = [np.random.default_rng(seed).normal(3, 1, (16, 2)) for seed in range(5)]
        stats = stats_after(norm, batches)
        np.testing.assert_allclose(
            stats["mean"], np.mean([batch.mean(0) for batch in batches], axis=0), rtol=1e-14
        )


@pytest.mark.parametrize("real", [0, 1])
def test_fewer_than_two_real_values_change_no_average(real):
    norm = BatchNorm(debias=True, variance="unbiased")
    before = stats_after(norm, BATCHES)
    y, after = train(
        norm,
        {"params": start(norm, BATCHES[0])["params"], "batch_stats": before},
        BATCHES[0],
        np.arange(8) < real,
    )
    jax.tree.map(np.testing.assert_array_equal, before, after["batch_stats"])
    assert np.isfinite(y).all()


def test_nan_in_padding_reaches_nothing():
    norm, x, mask = BatchNorm(), BATCHES[0].copy(), np.arange(8) < 5
    x[~mask] = np.nan
    variables = start(norm, x)

    def loss(params):
        y, _ = train(norm, {**variables, "params": params}, x, mask)
        return jnp.sum(jnp.where(mask[:, None], jnp.sin(y), 0))

    assert all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(loss)(variables["params"]))
    )


@pytest.mark.parametrize("statistics", [None, "batch", "running"])
@pytest.mark.parametrize("update", [None, True, False])
@pytest.mark.parametrize("use_running_average", [True, False])
def test_which_statistics_normalise_and_whether_they_are_updated(
    statistics, update, use_running_average
):
    norm, x = BatchNorm(momentum=0.5, statistics=statistics, update_average=update), BATCHES[1]
    variables = start(norm, x)
    y, updated = norm.apply(
        variables, x, use_running_average=use_running_average, mutable=["batch_stats"]
    )
    by_batch = (statistics or ("running" if use_running_average else "batch")) == "batch"
    updates = update if update is not None else not use_running_average
    np.testing.assert_allclose(y.mean(0), 0 if by_batch else x.mean(0), atol=1e-4)
    np.testing.assert_allclose(
        updated["batch_stats"]["mean"], 0.5 * MEANS[1] if updates else 0, atol=1e-5
    )


def test_an_evaluation_that_may_not_update_does_not():
    norm = BatchNorm(update_average=True)
    norm.apply(start(norm, BATCHES[0]), BATCHES[0], use_running_average=True)


def test_scale_and_bias_can_be_frozen():
    norm = BatchNorm(train_affine=False)
    variables = start(norm, BATCHES[0])

    def loss(params, x):
        return jnp.sum(jnp.sin(train(norm, {**variables, "params": params}, x)[0]))

    dparams, dx = jax.grad(loss, argnums=(0, 1))(variables["params"], BATCHES[0])
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(dparams))
    assert (dx != 0).any()


@pytest.mark.parametrize("axis", [1, -3, (1, 3), 0])
def test_other_channel_axes(axis):
    norm, x = BatchNorm(axis=axis, momentum=0.0), normal((4, 3, 5, 2))
    channels = {a % 4 for a in ([axis] if isinstance(axis, int) else axis)}
    y, updated = train(norm, start(norm, x), x)
    axes = tuple(a for a in range(4) if a not in channels)
    np.testing.assert_allclose(
        updated["batch_stats"]["mean"], x.mean(axes, dtype=np.float64), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(y.mean(axes), 0, atol=1e-5)


class Block(nn.Module):
    """A layer between products, as a network has it."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(BatchNorm(use_running_average=False, momentum=0.5)(x)), None


def test_remat_updates_once_and_changes_no_gradient():
    def results(block):
        variables = block.init(jax.random.key(0), BATCHES[1])

        def loss(params):
            (y, _), updated = block.apply(
                {**variables, "params": params}, BATCHES[1], mutable=["batch_stats"]
            )
            return jnp.sum(jnp.sin(y)), updated

        return jax.tree.leaves(jax.grad(loss, has_aux=True)(variables["params"]))

    for plain, remat in zip(results(Block()), results(nn.remat(Block)()), strict=True):
        np.testing.assert_allclose(plain, remat, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transform", ["vmap", "scan", "jit"])
def test_linen_transforms(transform):
    axes = {"params": 0, "batch_stats": 0}
    lifted = {
        "vmap": lambda: nn.vmap(
            Block, variable_axes=axes, split_rngs={"params": True}, axis_size=2
        ),
        "scan": lambda: nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2),
        "jit": lambda: nn.jit(Block),
    }[transform]()()
    x = np.stack(BATCHES[:2]) if transform == "vmap" else BATCHES[1]
    variables = lifted.init(jax.random.key(0), x)
    (y, _), updated = lifted.apply(variables, x, mutable=["batch_stats"])
    runs = 1 if transform == "jit" else 2
    layer_input = x
    for i in range(runs):
        own = variables if transform == "jit" else jax.tree.map(operator.itemgetter(i), variables)
        layer_input = x[i] if transform == "vmap" else layer_input
        (expected, _), expected_update = Block().apply(own, layer_input, mutable=["batch_stats"])
        actual = updated if transform == "jit" else jax.tree.map(operator.itemgetter(i), updated)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            actual,
            expected_update,
        )
        if transform == "vmap":
            np.testing.assert_allclose(y[i], expected, rtol=1e-5, atol=1e-5)
        layer_input = expected


def test_the_state_can_be_carried_through_a_scan():
    norm = BatchNorm(momentum=0.5, debias=True)
    final, _ = jax.lax.scan(
        lambda variables, x: (train(norm, variables, x)[1], None),
        start(norm, BATCHES[0]),
        np.stack(BATCHES),
    )
    np.testing.assert_allclose(
        final["batch_stats"]["mean"], stats_after(norm, BATCHES)["mean"], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        (
            {},
            {"x": np.ones((1, 3), np.float32)},
            r"shape \(1, 3\), which has fewer than 2 values per channel.*Use a larger batch",
        ),
        (
            {"axis_name": "batch"},
            {},
            r"axis_name = 'batch', but there is no mapped axis 'batch' here.*"
            r"jax.pmap\(..., axis_name='batch'\)",
        ),
        (
            {},
            {"mask": np.ones(5, bool)},
            r"mask of shape \(5,\) does not fit values of shape \(8, 3\).*\[8\]",
        ),
        ({}, {"mask": np.ones((8, 2), bool)}, r"mask of shape \(8, 2\) does not fit"),
        (
            {"momentum": 1.5},
            {},
            "momentum = 1.5 is invalid.*fraction of the old average that is kept",
        ),
        ({"variance": "sample"}, {}, "variance = 'sample'.*'biased', 'unbiased'"),
        ({"statistics": "moving"}, {}, "statistics = 'moving'.*'batch', 'running'"),
    ],
)
def test_errors_say_what_to_do(options, call, message):
    norm, x = BatchNorm(**options), call.pop("x", BATCHES[0])
    with pytest.raises((ValueError, NameError), match=message):
        norm.apply(
            start(BatchNorm(), x), x, use_running_average=False, mutable=["batch_stats"], **call
        )


def test_initialisation_needs_no_axis_and_no_second_example():
    BatchNorm(axis_name="nowhere").init(
        jax.random.key(0), np.ones((1, 3), np.float32), use_running_average=False
    )


def test_averages_that_are_rounded_to_bfloat16_stand_still_where_a_step_is_too_small():
    """As a framework has it that stores them so: NumPy, rounding after each update."""
    norm, rng = BatchNorm(momentum=0.99, average_dtype=jnp.bfloat16), np.random.default_rng(0)
    batches = [rng.normal(3, 1, (64, 4)).astype(np.float32) for _ in range(60)]
    stats = stats_after(norm, batches)
    exact = stats_after(BatchNorm(momentum=0.99), batches)
    for name, of in (("mean", np.mean), ("var", np.var)):
        average = np.full(4, float(name == "var"))
        for batch in batches:
            updated = 0.99 * average + 0.01 * of(batch.astype(np.float64), axis=0)
            average = updated.astype(jnp.bfloat16).astype(np.float64)
        assert stats[name].dtype == jnp.float32
        # A number that lies between two of bfloat16 may be rounded the other way: one unit, 2**-8.
        np.testing.assert_allclose(stats[name], average, rtol=3 * 2**-8)
        np.testing.assert_array_equal(stats[name], stats[name].astype(jnp.bfloat16))
    assert (abs(exact["mean"] - 3 * (1 - 0.99**60)) < 0.1).all()
    assert (exact["mean"] != stats["mean"]).all()
