"""One network in linen, NNX and Equinox: ported, folded and made precise, with the same results."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bnjax import clinic
from bnjax.clinic.folding import plan
from bnjax.clinic.porting import Table, port_into
from bnjax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(1, 2, (12, 6, 6, 4)).astype(np.float32)
FLAT = Table({"{name}": "{name}"}, {"logits": (4, 4, 8)})


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(not train, name="first")(x)
        x = nn.Conv(8, (3, 3), padding="VALID", feature_group_count=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(not train, name="second")(x))
        x = nn.BatchNorm(not train, name="third")(x)
        return nn.Dense(3, name="logits")(x.reshape(len(x), -1))


class OfNnx(nnx.Module):
    def __init__(self, rngs):
        options = {"padding": "VALID", "feature_group_count": 2}
        self.first = nnx.BatchNorm(4, rngs=rngs)
        self.conv = nnx.Conv(4, 8, (3, 3), **options, rngs=rngs)
        self.second, self.third = nnx.BatchNorm(8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.logits = nnx.Linear(128, 3, rngs=rngs)

    def __call__(self, x):
        x = self.third(nnx.relu(self.second(self.conv(self.first(x)))))
        return self.logits(x.reshape(len(x), -1))


class OfEquinox(eqx.Module):
    first: eqx.nn.BatchNorm
    conv: eqx.nn.Conv2d
    second: eqx.nn.BatchNorm
    third: eqx.nn.BatchNorm
    logits: eqx.nn.Linear

    def __init__(self, key):
        norms = [eqx.nn.BatchNorm(size, "batch", mode="batch") for size in (4, 8, 8)]
        self.first, self.second, self.third = norms
        self.conv = eqx.nn.Conv2d(4, 8, 3, groups=2, key=key)
        self.logits = eqx.nn.Linear(128, 3, key=key)

    def __call__(self, x, state):
        x, state = self.first(x, state)
        x, state = self.second(self.conv(x), state)
        x, state = self.third(jax.nn.relu(x), state)
        return self.logits(x.ravel()), state


def networks():
    """One network of each library, with different weights."""
    variables = OfLinen().init(jax.random.key(0), IMAGES, False)
    return {
        "linen": clinic.linen(OfLinen(), **variables),
        "nnx": clinic.nnx(OfNnx(nnx.Rngs(1))),
        "equinox": clinic.equinox(*eqx.nn.make_with_state(OfEquinox)(jax.random.key(2))),
    }


def batch_for(name):
    return {"image": jnp.moveaxis(IMAGES, -1, 1) if name == "equinox" else IMAGES}


def logits(name, network):
    """Computed by the library itself, in evaluation."""
    image = batch_for(name)["image"]
    if name == "linen":
        variables = {"params": network.params, "batch_stats": network.batch_stats}
        return network.model.apply(variables, image, train=False)
    model = network.model
    if name == "nnx":
        model.eval()
        return model(image)
    inference, state = eqx.nn.inference_mode(model), network.state
    return jax.vmap(lambda x: inference(x, state)[0], axis_name="batch")(image)


@pytest.mark.parametrize(
    "source",
    ["linen", *(pytest.param(name, marks=pytest.mark.slow) for name in ("nnx", "equinox"))],
)
def test_a_ported_network_has_the_same_logits_statistics_and_folds(source):
    made = networks()
    start = made[source]
    scales = {
        name: {leaf: jnp.asarray(RNG.normal(0, 1, value.shape)) for leaf, value in leaves.items()}
        for name, leaves in start.params.items()
    }
    start = clinic.precise(start.replace(params=scales), [batch_for(source)])
    truth = logits(source, start)
    for name, other in made.items():
        ported = port_into(other, start, FLAT)
        np.testing.assert_allclose(logits(name, ported), truth, rtol=1e-4, atol=1e-4)
        again = clinic.precise(ported, [batch_for(name)])
        for norm in ("first", "second", "third"):
            for leaf in ("mean", "var"):
                mine, its = again.batch_stats[norm][leaf], start.batch_stats[norm][leaf]
                np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-6)
        found = plan(ported, batch_for(name)["image"])
        pairs = [(one.norm, one.layer, one.place) for one in found.norms]
        assert pairs == [
            (("first",), ("conv",), "before"),
            (("second",), ("conv",), "after"),
            (("third",), ("logits",), "before"),
        ]
        np.testing.assert_allclose(logits(name, found.network), truth, rtol=1e-4, atol=1e-4)


def test_other_layers_are_refused():
    made = networks()
    with pytest.raises(UserError, match="Not in this network"):
        port_into(made["linen"], made["nnx"], Table({"{name}": "other_{name}"}))


def test_equinox_trains_on_from_precise_statistics():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, "batch", momentum=0.9, mode="batch")
    image = jnp.moveaxis(IMAGES, -1, 1)

    def call(norm, state, images, key):
        run = jax.vmap(norm, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = run(images, state)
        return y.mean((2, 3)), state

    made = clinic.precise(clinic.equinox(norm, state, call), [{"image": image}])
    _, state = call(made.model, made.state, image, None)  # one more step, on the same images
    after = clinic.equinox(norm, state, call).batch_stats
    np.testing.assert_allclose(after["mean"], IMAGES.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(after["var"], IMAGES.var((0, 1, 2)), rtol=1e-5)
