"""The norms without running averages against their papers' equations in NumPy float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import EPSILON, X, apply, normalised
from numpy.testing import assert_allclose

from bnjax import norms


def rms(x, axes):
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + EPSILON)


PER_EXAMPLE = {
    "layer": lambda x: normalised(x, (1, 2, 3)),
    "group": lambda x: normalised(x.reshape(6, 4, 5, 2, 4), (1, 2, 4)).reshape(x.shape),
    "instance": lambda x: normalised(x, (1, 2)),
    "rms": lambda x: rms(x, (1, 2, 3)),
    "frn": lambda x: rms(x, (1, 2)),
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
    assert_allclose(y, expected, rtol=1e-5, atol=1e-5 + n * 2.0**-24 * mean)
    found, _ = apply(norm, x, params={"scale": scale, "bias": bias})
    assert_allclose(found, y * scale + bias, rtol=1e-5, atol=1e-4)


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


def test_the_threshold_is_learnt_and_replaces_the_zero_of_relu():
    layer = norms.ThresholdedLinear()
    assert layer.init(jax.random.key(0), X)["params"]["threshold"].shape == (8,)
    threshold = np.linspace(-1, 1, 8, dtype=np.float32)
    found = layer.apply({"params": {"threshold": threshold}}, X)
    assert_allclose(found, np.maximum(X, threshold))


def test_standardised_convolution():
    conv, plain = (kind(4, (3, 3), padding="VALID") for kind in (norms.StandardizedConv, nn.Conv))
    variables, others = (kind.init(jax.random.key(0), X) for kind in (conv, plain))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, others)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    kernel = (kernel - kernel.mean((0, 1, 2))) / np.sqrt(kernel.var((0, 1, 2)) + 1e-5)
    params = {**variables["params"], "kernel": kernel.astype(np.float32)}
    expected = plain.apply({"params": params}, X)
    assert_allclose(conv.apply(variables, X), expected, rtol=1e-4, atol=1e-4)
    gradient = jax.grad(lambda params: jnp.sum(jnp.sin(conv.apply({"params": params}, X))))
    found = np.asarray(gradient(variables["params"])["kernel"], np.float64)
    # What the mean takes away has no gradient: the 72 of an output sum to zero, but for what
    # rounding each of them leaves.
    assert (np.abs(found.sum((0, 1, 2))) < 1e-5 * np.abs(found).sum((0, 1, 2))).all()
    assert np.abs(found).max() > 0.1
