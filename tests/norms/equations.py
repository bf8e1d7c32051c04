"""An input, and functions that the tests of the norms share."""

import jax
import numpy as np

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
