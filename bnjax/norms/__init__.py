"""The normalisation layers, built by name."""

import functools
from collections.abc import Callable

import flax.linen as nn

NORMS = ("batch", "none")


def build(
    name: str, *, momentum: float = 0.75, epsilon: float = 1e-3, scale: bool = True, shift: bool = True
) -> Callable[..., nn.Module] | None:
    """Returns what makes a layer of this kind (called with `name`), or None for "none".

    Args:
        name: one of `NORMS`.
        momentum: the fraction of the old running average that is kept, as in Flax, TensorFlow and Keras.
        epsilon: added to the variance.
        scale, shift: whether the layer learns a scale and a shift for each channel.

    Raises:
        ValueError: for an unknown name.
    """
    if name == "none":
        return None
    if name == "batch":
        return functools.partial(nn.BatchNorm, momentum=momentum, epsilon=epsilon, use_scale=scale, use_bias=shift)
    raise ValueError(f"there is no norm named {name!r}; there are {', '.join(NORMS)}")
