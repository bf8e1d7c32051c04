"""Weight standardization (Qiao et al., 2019), the companion of norms that look at one example."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from bnjax.types import Array

EPSILON = 1e-5


class StandardizedConv(nn.Conv):
    """A convolution whose kernel has mean 0 and variance 1 for each output (equation 7).

    What is stored, and trained, is the kernel [h, w, in, out] before that, under the same names as
    in `flax.linen.Conv`.
    """

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Returns a parameter, standardised if it is the kernel."""
        value = super().param(name, *args, **kwargs)
        return standardize(value) if name == "kernel" else value


def standardize(kernel: Array) -> Array:
    """Returns the kernel with mean 0 and variance 1 over all axes but the last.

    >>> print(standardize(jnp.array([[1.0], [3.0]])).round(3).ravel())
    [-1.  1.]
    """
    axes = tuple(range(kernel.ndim - 1))
    centered = kernel - kernel.mean(axes, keepdims=True)
    return centered * lax.rsqrt(jnp.mean(lax.square(centered), axes, keepdims=True) + EPSILON)
