"""Small networks in linen, and one of them in NumPy and float64."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np

MOMENTUM, EPSILON = 0.75, 1e-3
IMAGES = np.random.default_rng(0).random((16, 5, 5, 2)) * [1, 3] + [0.5, -1]
IMAGES = IMAGES.astype(np.float32)


class Tiny(nn.Module):
    """A network of a norm followed by a dense layer."""

    norm: Any = partial(nn.BatchNorm, momentum=MOMENTUM, epsilon=EPSILON)

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = x.reshape(x.shape[0], -1)
        mask = None if mask is None else mask[:, None]
        x = self.norm(name="norm")(x, use_running_average=not train, mask=mask)
        return nn.Dense(3, name="dense")(x)


class Net(nn.Module):
    """A network with three norms in sequence."""

    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        norm = partial(self.norm, use_running_average=not train, epsilon=EPSILON)
        x = nn.relu(norm(name="first")(nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)))
        x = nn.relu(nn.Dense(7, name="dense")(x.reshape(len(x), -1)))
        x = nn.Dense(5, name="logits")(norm(name="second")(x))
        return norm(name="third")(x)


def in_numpy(params, x, moments):
    """Returns the logits. Norms use the mean and variance `moments(name, x)`, x [values, c]."""
    weights = jax.tree.map(np.float64, params)

    def norm(x, name):
        mean, var = moments(name, x.reshape(-1, x.shape[-1]))
        return (x - mean) / np.sqrt(var + EPSILON) * weights[name]["scale"] + weights[name]["bias"]

    windows = np.lib.stride_tricks.sliding_window_view(np.float64(x), (3, 3), axis=(1, 2))
    x = np.einsum("nhwcij,ijcf->nhwf", windows, weights["conv"]["kernel"])
    x = np.maximum(norm(x + weights["conv"]["bias"], "first"), 0).reshape(len(x), -1)
    x = np.maximum(x @ weights["dense"]["kernel"] + weights["dense"]["bias"], 0)
    x = norm(x, "second") @ weights["logits"]["kernel"] + weights["logits"]["bias"]
    return norm(x, "third")


def padded(image, size=8):
    """Returns a batch of these images in random order, padded with NaN."""
    filling = np.full((size - len(image), *image.shape[1:]), np.nan, np.float32)
    order = np.random.default_rng(size).permutation(size)
    return {
        "image": np.concatenate([image, filling])[order],
        "mask": (np.arange(size) < len(image))[order],
    }
