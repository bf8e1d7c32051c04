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


def test_both_gradients_have_rounded_operands():
    dx, dweight = jax.vjp(bfloat16_product, jnp.asarray(X), jnp.asarray(WEIGHT))[1](DY)
    np.testing.assert_allclose(dx, rounded(DY) @ rounded(WEIGHT).T, atol=1e-4)
    np.testing.assert_allclose(dweight, rounded(X).T @ rounded(DY), atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 300), (2, 3, 300)])
def test_flax_takes_it(shape):
    dense, x = nn.Dense(11, dot_general=bfloat16_dot_general), X[:6].reshape(shape)
    params = {"kernel": WEIGHT, "bias": DY[0]}
    found = dense.apply({"params": params}, x)
    np.testing.assert_allclose(found, rounded(x) @ rounded(WEIGHT) + DY[0], atol=1e-4)


def test_other_products_are_refused():
    with pytest.raises(ValueError, match=r"inputs \[..., k\]"):
        bfloat16_dot_general(X, WEIGHT.T, (((1,), (1,)), ((), ())))
