"""Layers in NumPy's float64."""

import jax
import numpy as np


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def windows(x, side, stride=1, edge=0, fill=0.0):
    """The squares [n, h, w, side, side, c] of images with so many pixels of `fill` around."""
    x = np.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=fill)
    squares = np.lib.stride_tricks.sliding_window_view(x, (side, side), (1, 2))
    return squares[:, ::stride, ::stride].transpose(0, 1, 2, 4, 5, 3)


def conv(x, layer, stride=1, edge=0):
    squares = windows(x, len(layer["kernel"]), stride, edge)
    return np.tensordot(squares, layer["kernel"], 3) + layer.get("bias", 0)


def norm(x, params, stats, epsilon):
    y = (x - stats["mean"]) / np.sqrt(stats["var"] + epsilon)
    return y * params.get("scale", 1) + params["bias"]
