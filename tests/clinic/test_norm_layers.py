"""The norms of other people's networks: which there are, and what they are given."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from foreign import NETWORKS

from bnjax.clinic.linen import Network, nothing_seen, observe
from bnjax.norms import BatchNorm
from bnjax.train_step import init_variables

IMAGES = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)

NAMES = {
    "resnet": [
        "norm_init",
        "BasicBlock_0.BatchNorm_0",
        "BasicBlock_0.BatchNorm_1",
        "BasicBlock_1.BatchNorm_0",
        "BasicBlock_1.BatchNorm_1",
        "BasicBlock_1.norm_proj",
    ],
    "preact": ["BatchNorm_0", "BatchNorm_1", "BatchNorm_2", "BatchNorm_3", "last"],
    "scan": ["layers.BatchNorm_0"],
    "remat": ["layer0.BatchNorm_0", "layer1.BatchNorm_0"],
    "vmap": ["heads.BatchNorm_0"],
    "shared": ["_Layer_0.BatchNorm_0"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_in_the_order_of_their_calls(name):
    model = NETWORKS[name]
    variables = init_variables(model, jax.random.key(0), IMAGES[:1])
    for train in (False, True):
        layers = Network(*variables, model).norms({"image": IMAGES}, train=train)
        assert [layer.name for layer in layers] == NAMES[name]
        assert {layer.by_batch for layer in layers} == {train}
        assert {layer.module.momentum for layer in layers} == {0.9}


@pytest.mark.parametrize("kind", ["same signature", "own signature", "shared scope"])
def test_a_norm_that_is_the_whole_model_and_on_another_axis(kind):
    x = np.random.default_rng(1).normal(3, 2, (5, 4, 3, 2)).astype(np.float32)
    norm = {"same signature": _Outer, "own signature": _Called, "shared scope": _Shared}[kind](
        axis=1
    )
    params, stats = init_variables(norm, jax.random.key(0), x)
    (layer,) = Network(params, stats, norm).norms({"image": x})
    assert (layer.path, layer.axes) == ((), (0, 2, 3))
    _, seen = observe(params, stats, nothing_seen(stats), {"image": x}, model=norm, mode="running")
    (found,) = seen.values()
    np.testing.assert_allclose(found.mean, x.mean((0, 2, 3), np.float64), rtol=1e-6)
    np.testing.assert_allclose(found.var, x.var((0, 2, 3), np.float64), rtol=1e-6)
    assert (np.asarray(found.count) == 30).all()


class _Called(BatchNorm):
    """A norm that is the whole model: it extends another, and is called in another way."""

    def __call__(self, x, *, train, mask=None):
        return super().__call__(x, not train, mask=mask).mean((1, 2))


class _Extended(nn.BatchNorm):
    """One that is called as the norm that it extends, which is not to count twice."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(2 * x / 2, use_running_average, mask=mask)


class _Outer(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x, train):
        norm = _Extended(axis=self.axis)
        nn.share_scope(self, norm)
        return norm(x, not train).mean((1, 2))


class _Shared(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x, train):
        norm = nn.BatchNorm(axis=self.axis)
        nn.share_scope(self, norm)
        return norm(x, use_running_average=not train).mean((1, 2))
