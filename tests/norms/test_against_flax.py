"""Flax's BatchNorm and ours: interchangeable where it is right; where it is not, ours is."""

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import start, train

from bnjax.norms import BatchNorm

IMAGES, OTHERS = (np.random.default_rng(0).normal(size=(2, 8, 3, 3, 4)) * 2 + 1).astype(np.float32)


def test_drop_in():
    ours, flax = (
        {field.name: field.default for field in dataclasses.fields(norm)}
        for norm in (BatchNorm, nn.BatchNorm)
    )
    # The initializers are functions, whose results are compared below.
    assert {name for name in flax if ours[name] != flax[name]} <= {"bias_init", "scale_init"}
    assert [*ours][: len(flax) - 2] == [*flax][:-2]  # by position; the last two are linen's own
    ours_call, flax_call = (
        [(one.name, one.kind, one.default) for one in inspect.signature(call).parameters.values()]
        for call in (BatchNorm.__call__, nn.BatchNorm.__call__)
    )
    assert ours_call == flax_call


def evaluated(norm, variables):
    return norm.apply(variables, OTHERS, use_running_average=True)


OPTIONS = [
    {},
    {"use_scale": False, "use_bias": False, "momentum": 0.5},
    {"axis": 1, "epsilon": 0.1},
    {"axis": (1, 3)},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"use_fast_variance": False},
    {"bias_init": nn.initializers.constant(3.0), "scale_init": nn.initializers.normal()},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "defaults")
@pytest.mark.parametrize("real", [8, 5])
def test_same_results(options, real):
    mask = None if real == 8 else np.arange(8).reshape(8, 1, 1, 1) < real

    def results(norm):
        variables = start(norm, IMAGES)
        y, after = train(norm, variables, IMAGES, mask)
        return variables, y[:real], after, evaluated(norm, after)  # padding gives anything

    flax, ours = (results(kind(**options)) for kind in (nn.BatchNorm, BatchNorm))
    assert jax.tree.structure(flax) == jax.tree.structure(ours)
    tolerance = 0.02 if jnp.bfloat16 in options.values() else 2e-6
    for a, b in zip(jax.tree.leaves(flax), jax.tree.leaves(ours), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(one, np.float32) for one in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_checkpoints_are_interchangeable():
    flax, ours = nn.BatchNorm(), BatchNorm(debias=True, variance="unbiased", momentum=None)
    for saver in (flax, ours):
        _, variables = train(saver, start(saver, IMAGES), IMAGES)
        results = (evaluated(norm, variables) for norm in (flax, ours))
        np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-6)


def test_low_precision_averages():
    stats = {"mean": jnp.full(4, 1.0, jnp.bfloat16), "var": jnp.full(4, 3.0, jnp.bfloat16)}
    x = jnp.full((1, 4), 1.0078125, jnp.bfloat16)
    options = {"use_scale": False, "use_bias": False, "dtype": jnp.float32}
    truth = 0.0078125 / np.sqrt(3 + 1e-5)
    flax, ours = (
        norm(**options).apply({"batch_stats": stats}, x, use_running_average=True)[0, 0]
        for norm in (nn.BatchNorm, BatchNorm)
    )
    assert abs(flax / truth - 1) > 1e-4
    np.testing.assert_allclose(ours, truth, rtol=1e-6)
