"""Against NumPy in float64 on operands that NumPy rounded."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bnjax.models.layers import bfloat16_dot_general, bfloat16_product

RNG = np.random.default_rng(0)
X, WEIGHT, DY = (
    RNG.normal(size=shape).astype(np.float32) for shape in ((7, 300), (300, 11), (7, 11))
)


def rounded(values):
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def test_operands_are_rounded_and_sums_are_not():
    found = bfloat16_product(X, WEIGHT)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, rounded(X) @ rounded(WEIGHT), atol=1e-4)
    assert np.abs(found - X.astype(np.float64) @ WEIGHT).max() > 1e-3  # so the rounding happened


def test_the_input_gradient_is_rounded_and_the_weight_gradient_is_not():
    dx, dweight = jax.vjp(bfloat16_product, jnp.asarray(X), jnp.asarray(WEIGHT))[1](DY)
    np.testing.assert_allclose(dx, rounded(DY) @ rounded(WEIGHT).T, atol=1e-4)
    terms = np.abs(X.astype(np.float64)).T @ np.abs(DY)
    assert (
        np.abs(dweight - X.astype(np.float64).T @ DY) <= 7 * 2.0**-24 * terms
    ).all()  # sums of 7 in float32


def test_flax_takes_it():
    dense = nn.Dense(11, dot_general=bfloat16_dot_general)
    params = {"kernel": WEIGHT, "bias": DY[0]}
    np.testing.assert_allclose(
        dense.apply({"params": params}, X), rounded(X) @ rounded(WEIGHT) + DY[0], atol=1e-4
    )
    with pytest.raises(ValueError, match=r"inputs \[n, k\]"):
        dense.apply({"params": params}, X[None])
