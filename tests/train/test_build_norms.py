"""Every norm by its name in the config takes a step."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

from bnjax import norms
from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train_step import init_state, train_step

CLASSES = 3
WORKING = {  # where the options of the others would not do
    "batch": {"debias": True, "variance": "unbiased"},
    "ghost": {"virtual_batch": 4},
    "renorm": {"renorm_steps": 8},
    "group": {"placement": "before", "groups": 2, "weight_standardization": True},
    "instance": {"placement": "after", "norm_dense": (False,)},
    "frn": {"placement": "before", "norm_dense": (False,)},
}


def built(name):
    config = default_config()
    config.model.update(filters=(6,), kernels=(3,), strides=(2,), dense=(8,), dropout=(0.0,))
    config.model.update(norm=name, norm_dense=(True,))
    config.model.update(WORKING.get(name, {}))
    build.check(config)
    return build.network(config.model, CLASSES, (8, 8, 1))


@pytest.mark.parametrize("name", [*norms.NORMS, "none"])
def test_steps_have_its_statistics_and_its_activation(name):
    model, tx = built(name), optax.sgd(0.1)
    batch = {
        "image": np.zeros((16, 8, 8, 1)),
        "label": np.zeros(16, int),
        "mask": np.ones(16, bool),
    }
    init = partial(init_state, model, tx)
    state, stats = jax.eval_shape(init, jax.random.key(0), batch["image"])
    step = partial(train_step, model=model, tx=tx)
    assert jax.eval_shape(step, state, stats, batch)[:2] == (state, stats)
    assert bool(stats) == (name in norms.BATCH_NORMS)
    # Only the thresholded unit has parameters.
    units = {layer for layer in state.params if layer.endswith("activation")}
    assert units == ({"conv0_activation"} if name == "frn" else set())
