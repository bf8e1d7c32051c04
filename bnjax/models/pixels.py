"""What networks do to pixels first."""

from collections.abc import Sequence

import jax.numpy as jnp

from bnjax.types import Array, Images


def standardised(x: Images, mean: Sequence[float], std: Sequence[float]) -> Array:
    """Returns (x - mean) / std for each channel, at least float32; x if both are empty.

    Args:
        x: float [n, h, w, c].
        mean, std: c numbers each, on the scale of x.
    """
    if not mean and not std:
        return x
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    center, width = (jnp.asarray(one, x.dtype).reshape(1, 1, 1, -1) for one in (mean, std))
    return (x - center) / width
