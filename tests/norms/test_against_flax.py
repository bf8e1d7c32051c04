"""Flax's BatchNorm and ours: interchangeable where it is right; where it is not, ours is."""

import dataclasses
import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.norms import BatchNorm


def images(seed=0):
    return np.random.default_rng(seed).normal(size=(8, 3, 3, 4)).astype(np.float32) * 2 + 1


def test_drop_in():
    fields = {field.name: field.default for field in dataclasses.fields(nn.BatchNorm)}
    ours = {field.name: field.default for field in dataclasses.fields(BatchNorm)}
    different = {name for name, default in fields.items() if ours[name] != default}
    assert different <= {"bias_init", "scale_init"}  # functions, whose results are compared below
    assert [*ours][: len(fields) - 2] == [*fields][:-2]  # by position; the last two are linen's own
    ours_call, flax_call = (
        inspect.signature(norm.__call__).parameters for norm in (BatchNorm, nn.BatchNorm)
    )
    assert [(p.name, p.kind, p.default) for p in ours_call.values()] == [
        (p.name, p.kind, p.default) for p in flax_call.values()
    ]


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
@pytest.mark.parametrize("masked", [False, True])
def test_same_results(options, masked):
    mask = np.arange(8).reshape(8, 1, 1, 1) < (5 if masked else 8)

    @functools.partial(jax.jit, static_argnums=0)
    def results(norm, x, other):
        variables = norm.init(jax.random.key(0), x, use_running_average=False)
        train = {"use_running_average": False, "mutable": ["batch_stats"]}
        y, updated = norm.apply(variables, x, mask=mask if masked else None, **train)
        evaluated = norm.apply({**variables, **updated}, other, use_running_average=True)
        return variables, y[mask[:, 0, 0, 0]], updated, evaluated  # padding gives anything

    flax, ours = (
        results(kind(**options), images(), images(1)) for kind in (nn.BatchNorm, BatchNorm)
    )
    assert jax.tree.structure(flax) == jax.tree.structure(ours)
    tolerance = 0.02 if jnp.bfloat16 in options.values() else 2e-6
    for a, b in zip(jax.tree.leaves(flax), jax.tree.leaves(ours), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = (np.asarray(one, np.float32) for one in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_checkpoints_are_interchangeable():
    flax, ours = nn.BatchNorm(), BatchNorm(debias=True, variance="unbiased", momentum=None)
    for saver, loader in ((flax, ours), (ours, flax)):
        variables = saver.init(jax.random.key(0), images(), use_running_average=True)
        options = {"use_running_average": False, "mutable": ["batch_stats"]}
        variables = {**variables, **saver.apply(variables, images(), **options)[1]}
        found, expected = (
            norm.apply(variables, images(1), use_running_average=True) for norm in (loader, saver)
        )
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_low_precision_averages():
    stats = {"mean": jnp.full(4, 1.0, jnp.bfloat16), "var": jnp.full(4, 3.0, jnp.bfloat16)}
    x = jnp.full((1, 4), 1.0, jnp.bfloat16) + jnp.bfloat16(0.0078125)
    options = {"use_scale": False, "use_bias": False, "dtype": jnp.float32}
    truth = 0.0078125 / np.sqrt(3 + 1e-5)
    flax, ours = (
        norm(**options).apply({"batch_stats": stats}, x, use_running_average=True)[0, 0]
        for norm in (nn.BatchNorm, BatchNorm)
    )
    assert abs(flax / truth - 1) > 1e-4
    np.testing.assert_allclose(ours, truth, rtol=1e-6)
