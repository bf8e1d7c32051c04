"""Every norm by its name in the config trains."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax import norms
from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train_step import init_state, train_step

CLASSES = 3


def config_of(**model):
    config = default_config()
    config.model.update(
        {
            "filters": (6,),
            "kernels": (3,),
            "strides": (2,),
            "dense": (8,),
            "dropout": (0.0,),
            "norm_dense": (True,),
        }
    )
    config.model.update(model)
    return config


def built(**model):
    config = config_of(**model)
    build.check(config)
    return build.network(config.model, CLASSES, (8, 8, 1))


WORKING = {  # where the options of the others would not do
    "batch": {"debias": True, "variance": "unbiased"},
    "ghost": {"virtual_batch": 4},
    "renorm": {"renorm_steps": 8},
    "group": {"placement": "before", "groups": 2, "weight_standardization": True},
    "instance": {"placement": "after", "norm_dense": (False,)},
    "frn": {"placement": "before", "norm_dense": (False,)},
}


@pytest.mark.parametrize("name", norms.NORMS)
def test_trains(name):
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, 16)
    image = (
        rng.normal(size=(16, 8, 8, 1)) * 0.3
        + label[:, None, None, None] * np.linspace(-1, 1, 8)[:, None]
    ).astype(np.float32)
    batch = {"image": image, "label": label, "mask": np.arange(16) < 13}
    model, tx = built(norm=name, **WORKING.get(name, {})), optax.sgd(0.1)
    state, stats = jax.jit(partial(init_state, model, tx))(jax.random.key(0), batch["image"])
    step = jax.jit(partial(train_step, model=model, tx=tx))
    losses = []
    for _ in range(25):
        state, stats, metrics = step(state, stats, batch)
        losses.append(metrics.means()["loss"])
    assert losses[-1] < 0.5 * losses[0]
    assert bool(stats) == (name in norms.BATCH_NORMS)


def test_the_thresholded_unit_follows_its_norm_and_relu_the_others():
    model = built(norm="frn", **WORKING["frn"])
    params = model.init(jax.random.key(0), jnp.zeros((2, 8, 8, 1)), train=False)["params"]
    assert {name for name in params if name.endswith("activation")} == {"conv0_activation"}
