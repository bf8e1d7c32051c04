"""The alternatives against their papers' equations in NumPy float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax import norms

EPSILON = 1e-3
X = (np.random.default_rng(0).normal(size=(6, 4, 5, 8)) * 2 + 3).astype(np.float32)
X64 = X.astype(np.float64)


def apply(norm, x, stats=None, train=True, mask=None, params=None):
    variables = norm.init(jax.random.key(0), x, use_running_average=True)
    variables = {
        "params": params or variables.get("params", {}),
        "batch_stats": variables.get("batch_stats", {}) if stats is None else stats,
    }
    y, updated = norm.apply(
        variables, x, use_running_average=not train, mask=mask, mutable=["batch_stats"]
    )
    return np.asarray(y), updated.get("batch_stats", {})


def normalised(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + EPSILON)


def rms(x, axes):
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + EPSILON)


PER_EXAMPLE = {
    "layer": lambda x: normalised(x, (1, 2, 3)),
    "group": lambda x: normalised(x.reshape(6, 4, 5, 2, 4), (1, 2, 4)).reshape(x.shape),
    "instance": lambda x: normalised(x, (1, 2)),
    "rms": lambda x: rms(x, (1, 2, 3)),
    "frn": lambda x: rms(x, (1, 2)),
    "none": lambda x: x,
}


@pytest.mark.parametrize("name", PER_EXAMPLE)
@pytest.mark.parametrize("mean", [0, 1e4])
def test_equation(name, mean):
    x = X + np.float32(mean)
    expected = PER_EXAMPLE[name](x.astype(np.float64))
    y, _ = apply(norms.build(name, epsilon=EPSILON, groups=2)(), x)
    # However it is ordered, a sum of n numbers is off by n roundings of it at most; where the mean
    # is subtracted, that is what remains of it, over a deviation of 1 or more.
    n = {"layer": 160, "group": 80, "instance": 20}.get(name, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 + n * 2.0**-24 * mean)


@pytest.mark.parametrize("name", ["layer", "group", "instance", "rms", "frn"])
def test_scale_and_shift_are_of_channels(name):
    scale, bias = np.arange(8.0, dtype=np.float32), np.arange(8.0, dtype=np.float32)[::-1].copy()
    norm = norms.build(name, epsilon=EPSILON, groups=2, use_bias=True)()
    y, _ = apply(norm, X, params={"scale": scale, "bias": bias})
    np.testing.assert_allclose(y, PER_EXAMPLE[name](X64) * scale + bias, rtol=1e-5, atol=1e-4)
    bare = norms.build(name, use_scale=False, use_bias=False, groups=2)().init(
        jax.random.key(0), X, use_running_average=True
    )
    assert not bare.get("params")


@pytest.mark.parametrize("name", ["instance", "frn"])
def test_vectors_have_no_positions_to_normalise_over(name):
    norm = norms.build(name)()
    variables = norm.init(jax.random.key(0), X[:, 0, 0], use_running_average=True)
    with pytest.raises(
        ValueError,
        match=r"input of shape \(6, 8\) has one value per channel.*use layer, group or rms",
    ):
        norm.apply(variables, X[:, 0, 0], use_running_average=True)


def test_groups_have_to_divide_the_channels():
    with pytest.raises(ValueError, match="3 groups do not divide the 8 channels"):
        apply(norms.GroupNorm(groups=3), X)


def test_ghost_normalises_each_virtual_batch_and_stores_the_whole():
    y, stats = apply(norms.GhostBatchNorm(virtual_batch=4, epsilon=EPSILON, momentum=0.0), X)
    expected = np.concatenate([normalised(X64[:4], (0, 1, 2)), normalised(X64[4:], (0, 1, 2))])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], X64.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], X64.var((0, 1, 2)), rtol=1e-5)


def test_ghost_fills_virtual_batches_with_real_examples():
    mask = np.array([1, 0, 1, 1, 0, 1], bool)
    y, _ = apply(norms.GhostBatchNorm(virtual_batch=2, epsilon=EPSILON), X, mask=mask)
    for pair in ([0, 2], [3, 5]):
        np.testing.assert_allclose(y[pair], normalised(X64[pair], (0, 1, 2)), atol=1e-5)


def test_ghost_joins_a_single_vector_to_the_virtual_batch_before_it():
    """By itself it has no variance, and its output would be a constant."""
    x = np.random.default_rng(3).normal(size=(9, 3)).astype(np.float32)
    y, _ = apply(norms.GhostBatchNorm(virtual_batch=4, epsilon=EPSILON), x)
    for rows in (slice(4), slice(4, 9)):
        wide = x[rows].astype(np.float64)
        wanted = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + EPSILON)
        np.testing.assert_allclose(y[rows], wanted, atol=1e-5)


def test_ghost_with_one_virtual_batch_is_batch_norm():
    ghost, batch = (
        apply(norm, X) for norm in (norms.GhostBatchNorm(virtual_batch=6), norms.BatchNorm())
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ghost, batch)
    with pytest.raises(ValueError, match="virtual_batch = 1 is invalid"):
        apply(norms.GhostBatchNorm(virtual_batch=1), X)


STATS = {
    "mean": np.full(8, 2.0, np.float32),
    "var": np.full(8, 1.5, np.float32),
    "count": np.int32(0),
}


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.1, 0.2), (100.0, 100.0)])
@pytest.mark.parametrize("running", [1.5, 20.0])  # below and above the variance of the batch
def test_renorm_is_the_papers_algorithm(r_max, d_max, running):
    stats = {**STATS, "var": np.full(8, running, np.float32)}
    y, updated = apply(
        norms.BatchRenorm(r_max=r_max, d_max=d_max, epsilon=EPSILON, momentum=0.9), X, stats
    )
    mean, std = X64.mean((0, 1, 2)), np.sqrt(X64.var((0, 1, 2)) + EPSILON)
    r = np.clip(std / np.sqrt(running + EPSILON), 1 / r_max, r_max)
    d = np.clip((mean - 2) / np.sqrt(running + EPSILON), -d_max, d_max)
    np.testing.assert_allclose(y, (X64 - mean) / std * r + d, atol=1e-4)
    np.testing.assert_allclose(updated["mean"], 0.9 * 2 + 0.1 * mean, rtol=1e-5)


def test_renorm_without_limits_trains_as_it_evaluates():
    norm = norms.BatchRenorm(r_max=1e6, d_max=1e6)
    np.testing.assert_allclose(
        apply(norm, X, STATS)[0], apply(norm, X, STATS, train=False)[0], atol=1e-4
    )


def test_renorm_takes_r_and_d_as_constants():
    norm = norms.BatchRenorm(r_max=100.0, d_max=100.0, epsilon=EPSILON, use_running_average=False)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    weight = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)

    def gradient(norm, factor):
        def loss(x):
            return jnp.sum(
                norm.apply({"params": params, "batch_stats": STATS}, x, mutable=["batch_stats"])[0]
                * weight
                * factor
            )

        return jax.jit(jax.grad(loss))(X)

    r = np.sqrt((X64.var((0, 1, 2), keepdims=True) + EPSILON) / (1.5 + EPSILON)).astype(np.float32)
    batch = norms.BatchNorm(epsilon=EPSILON, use_running_average=False)
    np.testing.assert_allclose(gradient(norm, 1.0), gradient(batch, r), atol=1e-4)


def test_renorm_opens_its_limits_with_the_updates():
    norm = norms.build("renorm", renorm_steps=8, momentum=1.0, epsilon=EPSILON)()
    closed, open_ = (apply(norm, X, {**STATS, "count": np.int32(count)})[0] for count in (0, 8))
    np.testing.assert_allclose(closed, apply(norms.BatchNorm(epsilon=EPSILON), X)[0], atol=1e-5)
    assert np.abs(open_ - closed).max() > 0.1
    assert apply(norm, X, STATS)[1]["count"] == 1


def test_the_threshold_is_learnt_and_replaces_the_zero_of_relu():
    layer = norms.ThresholdedLinear()
    assert layer.init(jax.random.key(0), X)["params"]["threshold"].shape == (8,)
    threshold = np.linspace(-1, 1, 8, dtype=np.float32)
    np.testing.assert_allclose(
        layer.apply({"params": {"threshold": threshold}}, X), np.maximum(X, threshold)
    )


def test_standardised_convolution():
    conv, plain = (kind(4, (3, 3), padding="VALID") for kind in (norms.StandardizedConv, nn.Conv))
    variables = conv.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(
        jnp.shape, plain.init(jax.random.key(0), X)
    )
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-5)
    expected = plain.apply(
        {"params": {**variables["params"], "kernel": kernel.astype(np.float32)}}, X
    )
    np.testing.assert_allclose(conv.apply(variables, X), expected, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(conv.apply({"params": params}, X))))(
        variables["params"]
    )["kernel"]
    gradient = np.asarray(gradient, np.float64)
    # What the mean takes away has no gradient: the 72 of an output sum to zero, but for what
    # rounding each of them leaves.
    assert (np.abs(gradient.sum((0, 1, 2))) < 1e-5 * np.abs(gradient).sum((0, 1, 2))).all()
    assert np.abs(gradient).max() > 0.1


@pytest.mark.parametrize("name", ["layer", "group", "instance", "rms", "frn"])
def test_an_example_without_a_real_position_is_finite_and_the_others_do_not_notice(name):
    mask = np.ones((6, 4, 5, 1), bool)
    mask[0] = False
    mask[1, 2:] = False
    norm = norms.build(name, groups=2)()
    y, expected = apply(norm, X, mask=mask)[0], apply(norm, X)[0]
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[2:], expected[2:], rtol=1e-5, atol=1e-5)
