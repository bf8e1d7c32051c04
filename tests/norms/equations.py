"""An input, and functions that the tests of the norms share."""

import functools

import jax
import numpy as np
from numpy.testing import assert_allclose

EPSILON = 1e-3
X = (np.random.default_rng(0).normal(size=(6, 4, 5, 8)) * 2 + 3).astype(np.float32)
X64 = X.astype(np.float64)


def start(norm, x):
    variables = norm.init(jax.random.key(0), x, use_running_average=True)
    return {"params": {}, "batch_stats": {}, **variables}


@functools.partial(jax.jit, static_argnums=0)
def train(norm, variables, x, mask=None):
    """Returns the output and the variables after the step."""
    options = {"use_running_average": False, "mutable": ["batch_stats"]}
    y, updated = norm.apply(variables, x, mask=mask, **options)
    return y, {**variables, **updated}


def apply(norm, x, mask=None, **variables):
    """Returns the output and the statistics after one step."""
    y, updated = train(norm, start(norm, x) | variables, x, mask)
    return np.asarray(y), updated["batch_stats"]


def normalised(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + EPSILON)


def assert_moments(stats, x, ddof=0, **bounds):
    """The statistics are the mean and the variance of each channel of x [..., c] in float64."""
    x = x.astype(np.float64).reshape(-1, x.shape[-1])
    assert_allclose(stats["mean"], x.mean(0), **bounds)
    assert_allclose(stats["var"], x.var(0, ddof=ddof), **bounds)
