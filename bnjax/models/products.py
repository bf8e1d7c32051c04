"""Matrix products of bfloat16 operands, for processors that multiply them faster than float32."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.types import Array

ROWS_WITH_ROWS = (((1,), (1,)), ((), ()))
COLUMNS_WITH_COLUMNS = (((0,), (0,)), ((), ()))


@jax.custom_vjp
def bfloat16_product(x: Array, weight: Array) -> Array:
    """Returns x @ weight, float32 [n, m], from operands rounded to bfloat16; the sums are float32.

    The gradient of `x` is computed the same way, that of `weight` from float32 operands: there
    bfloat16 gains no time on the CPUs that have it, since both would be contracted over their first
    axis.

    Args:
        x: float32 [n, k].
        weight: float32 [k, m].

    >>> weight = jnp.array([[1.0 + 2**-10], [4.0]])  # 1 + 2**-10 is 1 in bfloat16
    >>> bfloat16_product(jnp.array([[1.0, 2.0]]), weight)
    Array([[9.]], dtype=float32)
    """
    return lax.dot(
        x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )


def _forward(x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return bfloat16_product(x, weight), (x, weight)


def _backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight = saved
    small = (dy.astype(jnp.bfloat16), weight.astype(jnp.bfloat16))
    dx = lax.dot_general(*small, ROWS_WITH_ROWS, preferred_element_type=jnp.float32)
    return dx, lax.dot_general(x, dy, COLUMNS_WITH_COLUMNS)


bfloat16_product.defvjp(_forward, _backward)


def bfloat16_dot_general(
    x: Array, weight: Array, dimension_numbers: Any, precision: Any = None
) -> Array:
    """Is `bfloat16_product` in the form that `flax.linen.Dense` calls for vectors [n, k].

    Raises:
        ValueError: if the input is not [n, k].
    """
    if x.ndim != 2 or dimension_numbers != (((1,), (0,)), ((), ())):
        raise ValueError(
            f"bfloat16_dot_general takes inputs [n, k] and weights [k, m], and got {x.shape} and "
            f"{weight.shape}"
        )
    return bfloat16_product(x, weight)
