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


def apply(norm, x, stats=None, mask=None, params=None):
    variables = norm.init(jax.random.key(0), x, use_running_average=True)
    variables = {
        "params": params or variables.get("params", {}),
        "batch_stats": variables.get("batch_stats", {}) if stats is None else stats,
    }
    y, updated = norm.apply(
        variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
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
def test_equation_with_a_scale_and_a_shift_of_channels(name, mean):
    x = X + np.float32(mean)
    scale, bias = np.arange(8.0, dtype=np.float32), np.arange(8.0, dtype=np.float32)[::-1].copy()
    norm = norms.build(name, epsilon=EPSILON, groups=2, use_bias=True)()
    bare = norms.build(name, epsilon=EPSILON, groups=2, use_scale=False, use_bias=False)()
    y, expected = apply(bare, x)[0], PER_EXAMPLE[name](x.astype(np.float64))
    # However it is ordered, a sum of n numbers is off by n roundings of it at most; where the mean
    # is subtracted, that is what remains of it, over a deviation of 1 or more.
    n = {"layer": 160, "group": 80, "instance": 20}.get(name, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 + n * 2.0**-24 * mean)
    if name != "none":
        found, _ = apply(norm, x, params={"scale": scale, "bias": bias})
        np.testing.assert_allclose(found, y * scale + bias, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["layer", "group", "instance", "rms", "frn"])
def test_an_example_without_a_real_position_is_finite_and_changes_no_other(name):
    mask = np.ones((6, 4, 5, 1), bool)
    mask[0] = False
    mask[1, 2:] = False
    norm = norms.build(name, groups=2)()
    y, expected = apply(norm, X, mask=mask)[0], apply(norm, X)[0]
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[2:], expected[2:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("norm", "x", "message"),
    [
        (norms.InstanceNorm(), X[:, 0, 0], r"shape \(6, 8\) has one value per channel.*use layer"),
        (norms.FilterResponseNorm(), X[:, 0, 0], r"has one value per channel.*use layer"),
        (norms.GroupNorm(groups=3), X, "3 groups do not divide the 8 channels"),
        (norms.GhostBatchNorm(virtual_batch=1), X, "virtual_batch = 1 is invalid"),
    ],
)
def test_inputs_and_options_that_do_not_fit_are_refused(norm, x, message):
    with pytest.raises(ValueError, match=message):
        apply(norm, x)


@pytest.mark.parametrize(
    ("virtual_batch", "x", "mask", "batches"),
    [
        (4, X, None, [[0, 1, 2, 3], [4, 5]]),
        (6, X, None, [[0, 1, 2, 3, 4, 5]]),
        # Padding fills no virtual batch.
        (2, X, [1, 0, 1, 1, 0, 1], [[0, 2], [3, 5]]),
        # A single vector has no variance and joins the batch before it.
        (2, X[:5, 0, 0], None, [[0, 1], [2, 3, 4]]),
    ],
    ids=["last smaller", "whole batch", "padding", "single vector"],
)
def test_ghost_normalises_each_virtual_batch_and_stores_the_whole(virtual_batch, x, mask, batches):
    norm = norms.GhostBatchNorm(virtual_batch=virtual_batch, epsilon=EPSILON, momentum=0.0)
    y, stats = apply(norm, x, mask=None if mask is None else np.array(mask, bool))
    x, axes = x.astype(np.float64), tuple(range(x.ndim - 1))
    for rows in batches:
        np.testing.assert_allclose(y[rows], normalised(x[rows], axes), atol=1e-5)
    real = x[np.concatenate(batches)]
    np.testing.assert_allclose(stats["mean"], real.mean(axes), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], real.var(axes), rtol=1e-5)


def stats_with(var=1.5, count=0):
    var = np.full(8, var, np.float32)
    return {"mean": np.full(8, 2.0, np.float32), "var": var, "count": np.int32(count)}


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.1, 0.2), (100.0, 100.0)])
@pytest.mark.parametrize("running", [1.5, 20.0])  # below and above the variance of the batch
def test_renorm_is_the_papers_algorithm(r_max, d_max, running):
    norm = norms.BatchRenorm(r_max=r_max, d_max=d_max, epsilon=EPSILON, momentum=0.9)
    y, updated = apply(norm, X, stats_with(running))
    mean, std = X64.mean((0, 1, 2)), np.sqrt(X64.var((0, 1, 2)) + EPSILON)
    r = np.clip(std / np.sqrt(running + EPSILON), 1 / r_max, r_max)
    d = np.clip((mean - 2) / np.sqrt(running + EPSILON), -d_max, d_max)
    np.testing.assert_allclose(y, (X64 - mean) / std * r + d, atol=1e-4)
    np.testing.assert_allclose(updated["mean"], 0.9 * 2 + 0.1 * mean, rtol=1e-5)


def test_renorm_takes_r_and_d_as_constants():
    norm = norms.BatchRenorm(r_max=100.0, d_max=100.0, epsilon=EPSILON, use_running_average=False)
    params = {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}
    variables = {"params": params, "batch_stats": stats_with()}
    weight = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)

    def gradient(norm, factor):
        def loss(x):
            return jnp.sum(norm.apply(variables, x, mutable=["batch_stats"])[0] * weight * factor)

        return jax.jit(jax.grad(loss))(X)

    r = np.sqrt((X64.var((0, 1, 2), keepdims=True) + EPSILON) / (1.5 + EPSILON)).astype(np.float32)
    batch = norms.BatchNorm(epsilon=EPSILON, use_running_average=False)
    np.testing.assert_allclose(gradient(norm, 1.0), gradient(batch, r), atol=1e-4)


def test_renorm_opens_its_limits_with_the_updates():
    norm = norms.build("renorm", renorm_steps=8, momentum=1.0, epsilon=EPSILON)()
    closed, open_ = (apply(norm, X, stats_with(count=count)) for count in (0, 8))
    batch, _ = apply(norms.BatchNorm(epsilon=EPSILON), X)
    np.testing.assert_allclose(closed[0], batch, atol=1e-5)
    assert np.abs(open_[0] - closed[0]).max() > 0.1
    assert (closed[1]["count"], open_[1]["count"]) == (1, 9)


def test_the_threshold_is_learnt_and_replaces_the_zero_of_relu():
    layer = norms.ThresholdedLinear()
    assert layer.init(jax.random.key(0), X)["params"]["threshold"].shape == (8,)
    threshold = np.linspace(-1, 1, 8, dtype=np.float32)
    found = layer.apply({"params": {"threshold": threshold}}, X)
    np.testing.assert_allclose(found, np.maximum(X, threshold))


def test_standardised_convolution():
    conv, plain = (kind(4, (3, 3), padding="VALID") for kind in (norms.StandardizedConv, nn.Conv))
    variables, others = (kind.init(jax.random.key(0), X) for kind in (conv, plain))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, others)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-5)
    params = {**variables["params"], "kernel": kernel.astype(np.float32)}
    expected = plain.apply({"params": params}, X)
    np.testing.assert_allclose(conv.apply(variables, X), expected, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(conv.apply({"params": params}, X))))
    found = np.asarray(gradient(variables["params"])["kernel"], np.float64)
    # What the mean takes away has no gradient: the 72 of an output sum to zero, but for what
    # rounding each of them leaves.
    assert (np.abs(found.sum((0, 1, 2))) < 1e-5 * np.abs(found).sum((0, 1, 2))).all()
    assert np.abs(found).max() > 0.1
