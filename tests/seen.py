"""Checks that the clinic finds a norm and its inputs in a network of any library."""

import numpy as np
from zoo.kit import precise


def assert_moments(stats, x, rtol=1e-5, atol=0.0):
    """Compares `mean` and `var` with those of x [..., channels] in float64."""
    x = np.float64(x).reshape(-1, x.shape[-1])
    np.testing.assert_allclose(stats["mean"], x.mean(0), rtol, atol)
    np.testing.assert_allclose(stats["var"], x.var(0), rtol, atol)


def assert_norm_is_seen(network, images, *, added=0, gain=1, axes=(0,), follows_flag=True):
    """Compares a network of a layer `dense` and a norm `norm` with NumPy in float64.

    The norm adds `added` to its input, and multiplies its output by `gain`.
    """
    parts = [{"image": image} for image in np.split(images, 2)]
    (layer,), (in_training,) = (network.norms(parts[0], train=train) for train in (False, True))
    assert (layer.name, layer.axes, layer.by_batch) == ("norm", axes, False)
    assert sorted(layer.shape) == sorted((5, len(parts[0]["image"])))
    assert in_training.by_batch is follows_flag
    dense = network.params["dense"]
    x = np.float64(images.reshape(len(images), -1)) @ np.float64(dense["kernel"])
    x += np.float64(dense["bias"]) + added
    found = precise(network, parts)
    assert_moments(found.batch_stats["norm"], x, atol=1e-6)
    logits, _ = found.run({"image": images}, train=False)
    wanted = gain * (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)
