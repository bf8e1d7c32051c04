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


def test_a_good_step_has_nothing_to_name():
    state, stats, batch = start()
    assert first_nonfinite(state, stats, batch, model=MODEL) is None


def test_the_images_come_first():
    state, stats, batch = start()
    batch["image"][3, 2, 1] = np.inf
    assert first_nonfinite(state, stats, batch, model=MODEL) == "the image values"


def test_a_parameter_and_a_statistic_are_named_by_path():
    state, stats, batch = start()
    params = jax.tree.map(np.array, state.params)
    params["conv1"]["kernel"][0] = np.nan
    assert (
        first_nonfinite(state.replace(params=params), stats, batch, model=MODEL)
        == "the parameter conv1.kernel"
    )
    stats = jax.tree.map(np.array, stats)
    stats["dense0_norm"]["var"][2] = np.inf
    assert (
        first_nonfinite(state, stats, batch, model=MODEL) == "the running statistic dense0_norm.var"
    )


@pytest.mark.parametrize(("layer", "size"), [("conv0", 3e38), ("conv1", 3e38)])
def test_the_first_layer_that_overflows_is_named(layer, size):
    state, stats, batch = start()
    params = jax.tree.map(np.array, state.params)
    params[layer]["kernel"][:] = size
    params[layer]["bias"][:] = size
    assert (
        first_nonfinite(state.replace(params=params), stats, batch, model=MODEL)
        == f"the output of layer {layer}"
    )


def test_losses_and_gradients_are_the_last_to_be_looked_at():
    state, stats, batch = start()

    def infinite(logits, label):
        return logits.sum(-1) * np.float32(np.inf)

    def steep(logits, label):
        return jax.numpy.sqrt(logits.sum(-1) * 0)

    assert first_nonfinite(state, stats, batch, model=MODEL, loss_fn=infinite) == "the losses"
    assert first_nonfinite(state, stats, batch, model=MODEL, loss_fn=steep).startswith(
        "the gradient of "
    )


def test_padding_is_not_looked_at():
    state, stats, batch = start()
    batch["image"][5] = np.nan
    batch["mask"] = np.arange(6) < 5
    assert first_nonfinite(state, stats, batch, model=MODEL) is None
