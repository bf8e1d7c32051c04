import functools

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from bnjax.models.convnet import ConvNet
from bnjax.train.diagnostics import first_nonfinite
from bnjax.train_step import init_state

NORM = functools.partial(nn.BatchNorm, momentum=0.75)
MODEL = ConvNet(
    filters=(2, 3),
    kernels=(3, 3),
    strides=(1, 1),
    dense=(4,),
    dropout=(0.5,),
    norm_dense=(True,),
    classes=3,
    norm=NORM,
)


def start():
    images = np.random.default_rng(0).uniform(size=(6, 8, 8, 1)).astype(np.float32)
    init = jax.jit(functools.partial(init_state, MODEL, optax.sgd(0.1)))
    return *init(jax.random.key(0), images), {
        "image": images,
        "label": np.array([0, 1, 2, 0, 1, 2]),
    }


def put(tree, path, value):
    """Returns a copy of a tree in which a leaf has another value somewhere."""
    copy = jax.tree.map(np.array, tree)
    layer, leaf = path.split(".")
    copy[layer][leaf].flat[0] = value
    return copy


def test_a_good_step_and_padding_have_nothing_to_name():
    state, stats, batch = start()
    assert first_nonfinite(state, stats, batch, model=MODEL) is None
    batch["image"][5] = np.nan
    batch["mask"] = np.arange(6) < 5
    assert first_nonfinite(state, stats, batch, model=MODEL) is None


def test_images_parameters_and_statistics_are_named():
    state, stats, batch = start()
    bad = {**batch, "image": batch["image"] * np.float32(np.inf)}
    assert first_nonfinite(state, stats, bad, model=MODEL) == "the image values"
    params = put(state.params, "conv1.kernel", np.nan)
    found = first_nonfinite(state.replace(params=params), stats, batch, model=MODEL)
    assert found == "the parameter conv1.kernel"
    spoilt = put(stats, "dense0_norm.var", np.inf)
    found = first_nonfinite(state, spoilt, batch, model=MODEL)
    assert found == "the running statistic dense0_norm.var"


@pytest.mark.parametrize("layer", ["conv0", "conv1"])
def test_the_first_layer_that_overflows_is_named(layer):
    state, stats, batch = start()
    params = jax.tree.map(np.array, state.params)
    params[layer] = jax.tree.map(lambda leaf: np.full_like(leaf, 3e38), params[layer])
    found = first_nonfinite(state.replace(params=params), stats, batch, model=MODEL)
    assert found == f"the output of layer {layer}"


def test_losses_and_gradients_are_the_last_to_be_looked_at():
    state, stats, batch = start()

    def infinite(logits, label):
        return logits.sum(-1) * np.float32(np.inf)

    def steep(logits, label):
        return jax.numpy.sqrt(logits.sum(-1) * 0)

    assert first_nonfinite(state, stats, batch, model=MODEL, loss_fn=infinite) == "the losses"
    found = first_nonfinite(state, stats, batch, model=MODEL, loss_fn=steep)
    assert found.startswith("the gradient of ")
