"""Ghost batch norm and batch renorm against their papers' equations in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equations import EPSILON, X64, X, apply, assert_moments, normalised, start, train

from bnjax import norms


@pytest.mark.parametrize(
    ("virtual_batch", "x", "mask", "batches"),
    [
        (4, X, None, [[0, 1, 2, 3], [4, 5]]),
        (6, X, None, [[0, 1, 2, 3, 4, 5]]),
        # Padding fills no virtual batch.
        (2, X, [1, 0, 1, 1, 0, 1], [[0, 2], [3, 5]]),
        # One vector is left over. It has no variance, so it joins the last virtual batch.
        (2, X[:5, 0, 0], None, [[0, 1], [2, 3, 4]]),
    ],
    ids=["last smaller", "whole batch", "padding", "single vector"],
)
def test_ghost_normalises_each_virtual_batch_and_stores_the_whole(virtual_batch, x, mask, batches):
    norm = norms.GhostBatchNorm(virtual_batch=virtual_batch, epsilon=EPSILON, momentum=0.0)
    y, stats = apply(norm, x, mask=None if mask is None else np.array(mask, bool))
    for rows in batches:
        expected = normalised(x[rows].astype(np.float64), tuple(range(x.ndim - 1)))
        np.testing.assert_allclose(y[rows], expected, atol=1e-5)
    assert_moments(stats, x[np.concatenate(batches)], rtol=1e-5)


def stats_with(var=1.5, count=0):
    var = np.full(8, var, np.float32)
    return {"mean": np.full(8, 2.0, np.float32), "var": var, "count": np.int32(count)}


@pytest.mark.parametrize(("r_max", "d_max"), [(1.0, 0.0), (1.1, 0.2), (100.0, 100.0)])
@pytest.mark.parametrize("running", [1.5, 20.0])  # below and above the variance of the batch
def test_renorm_is_the_papers_algorithm(r_max, d_max, running):
    norm = norms.BatchRenorm(r_max=r_max, d_max=d_max, epsilon=EPSILON, momentum=0.9)
    y, updated = apply(norm, X, batch_stats=stats_with(running))
    mean, std = X64.mean((0, 1, 2)), np.sqrt(X64.var((0, 1, 2)) + EPSILON)
    r = np.clip(std / np.sqrt(running + EPSILON), 1 / r_max, r_max)
    d = np.clip((mean - 2) / np.sqrt(running + EPSILON), -d_max, d_max)
    np.testing.assert_allclose(y, (X64 - mean) / std * r + d, atol=1e-4)
    np.testing.assert_allclose(updated["mean"], 0.9 * 2 + 0.1 * mean, rtol=1e-5)


def test_renorm_takes_r_and_d_as_constants():
    norm = norms.BatchRenorm(r_max=100.0, d_max=100.0, epsilon=EPSILON)
    variables = start(norm, X) | {"batch_stats": stats_with()}
    weight = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)

    def gradient(norm, factor):
        return jax.grad(lambda x: jnp.sum(train(norm, variables, x)[0] * weight * factor))(X)

    r = np.sqrt((X64.var((0, 1, 2), keepdims=True) + EPSILON) / (1.5 + EPSILON)).astype(np.float32)
    batch = norms.BatchNorm(epsilon=EPSILON)
    np.testing.assert_allclose(gradient(norm, 1.0), gradient(batch, r), atol=1e-4)


def test_renorm_opens_its_limits_with_the_updates():
    norm = norms.build("renorm", renorm_steps=8, momentum=1.0, epsilon=EPSILON)()
    closed, open_ = (apply(norm, X, batch_stats=stats_with(count=count)) for count in (0, 8))
    batch, _ = apply(norms.BatchNorm(epsilon=EPSILON), X)
    np.testing.assert_allclose(closed[0], batch, atol=1e-5)
    assert np.abs(open_[0] - closed[0]).max() > 0.1
    assert (closed[1]["count"], open_[1]["count"]) == (1, 9)
