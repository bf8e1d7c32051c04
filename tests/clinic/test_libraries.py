"""Networks in linen, NNX and Equinox: the same results, against NumPy and one another."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from foreign import Lifted
from numpy_network import padded
from zoo.kit import audit, precise, shared_jit

from bnjax import clinic, compat
from bnjax.clinic.folding import plan
from bnjax.clinic.porting import Table, port_into
from bnjax.errors import UserError

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(1, 2, (12, 6, 6, 4)).astype(np.float32)
FLAT = Table({"{name}": "{name}"}, {"logits": (4, 4, 8)})
norm_of = functools.partial(eqx.nn.BatchNorm, axis_name="batch", mode="batch")
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


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
        self.first, self.second, self.third = norm_of(4), norm_of(8), norm_of(8, mode="ema")
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


def images_for(name):
    return np.moveaxis(IMAGES, -1, 1) if name == "equinox" else IMAGES


def batches_for(name):
    image = images_for(name)
    return [padded(image[:7], 7), padded(image[7:], 7)]


def logits(name, network):
    """Computed by the library itself, in evaluation."""
    image = images_for(name)
    if name == "linen":
        variables = {"params": network.params, "batch_stats": network.batch_stats}
        return network.model.apply(variables, image, train=False)
    model = network.model
    if name == "nnx":
        model.eval()
        return model(image)
    inference, state = eqx.nn.inference_mode(model), network.state
    return jax.vmap(lambda x: inference(x, state)[0], axis_name="batch")(image)


def precise_in_float64(name, network, by):
    """In float64, because the layers of the libraries sum in different orders."""

    def exact(leaf):
        return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf

    with compat.enable_x64(True):
        network, batches = jax.tree.map(exact, (network, batches_for(name)))
        return precise(network, batches, by=by).batch_stats


@pytest.mark.parametrize("source", ["linen", SLOW("nnx"), SLOW("equinox")])
def test_a_ported_network_has_the_same_statistics_and_logits_and_folds(source):
    made = networks()
    start = made[source]
    scales = jax.tree.map(lambda leaf: np.float32(RNG.normal(0, 0.5, leaf.shape)), start.params)
    start = precise(start.replace(params=scales), batches_for(source), by="population")
    truth = logits(source, start)
    exact = {by: precise_in_float64(source, start, by) for by in ("batch", "population")}
    for name, other in made.items():
        ported = port_into(other, start, FLAT)
        np.testing.assert_allclose(logits(name, ported), truth, rtol=1e-4, atol=1e-4)
        for by, its in exact.items():
            mine = precise_in_float64(name, ported, by)
            for norm in ("first", "second", "third"):
                for leaf in ("mean", "var"):
                    np.testing.assert_allclose(mine[norm][leaf], its[norm][leaf], 1e-6, 1e-6)
        found = plan(ported, images_for(name))
        assert [(*one.norm, *one.layer, one.place) for one in found.norms] == [
            ("first", "conv", "before"),
            ("second", "conv", "after"),
            ("third", "logits", "before"),
        ]
        np.testing.assert_allclose(logits(name, found.network), truth, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="Not in this network"):
        port_into(made["linen"], made["nnx"], Table({"{name}": "other_{name}"}))


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(12, 12, rngs=rngs), nnx.BatchNorm(12, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)  # has a key for each of several layers

    def __call__(self, x):
        return nnx.relu(self.dropout(self.norm(self.dense(x))))


class NnxLayers(nnx.Module):
    def __init__(self, how, rngs):
        axes = nnx.StateAxes({nnx.BatchStat: None if how == "averages" else 0, ...: 0})
        make = nnx.split_rngs(splits=3)(nnx.vmap(NnxLayer, axis_size=3, out_axes=axes))
        self.how, self.layers = how, NnxLayer(rngs) if how == "shared" else make(rngs)

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        if self.how == "vmap":
            run = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
            return run(self.layers, x).mean(0)
        if self.how == "shared":
            return self.layers(self.layers(x))
        averages = nnx.Carry if self.how == "averages" else 0
        axes = nnx.Carry, nnx.StateAxes({nnx.BatchStat: averages, ...: 0})
        scanned = nnx.scan(lambda x, layer: layer(x), in_axes=axes, out_axes=nnx.Carry)
        return scanned(x, self.layers)


class EquinoxLayer(eqx.Module):
    dense: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.dense, self.norm = eqx.nn.Linear(12, 12, use_bias=False, key=key), norm_of(12)

    def __call__(self, x, state):
        x, state = self.norm(self.dense(x), state)
        return jax.nn.relu(x), state


class EquinoxLayers(eqx.Module):
    layers: eqx.Module
    how: str = eqx.field(static=True)

    def __init__(self, key, how):
        self.how, keys = how, jax.random.split(key)
        if how in ("scan", "vmap"):
            self.layers = eqx.filter_vmap(EquinoxLayer)(keys)
            return
        one, other = map(EquinoxLayer, keys)
        self.layers = [one, eqx.tree_at(lambda layer: layer.norm, other, one.norm)]
        if how == "shared":
            ends = {"where": lambda layers: layers[1].norm, "get": lambda layers: layers[0].norm}
            self.layers = eqx.nn.Shared(self.layers, **ends)

    def __call__(self, x, state):
        x = x.ravel()
        if self.how in ("shared", "one state"):
            for layer in self.layers() if self.how == "shared" else self.layers:
                x, state = layer(x, state)
            return x, state
        own = state.substate(self.layers)
        if self.how == "scan":
            arrays, static = eqx.partition(self.layers, eqx.is_array)

            def step(x, one):
                return eqx.combine(one[0], static)(x, one[1])

            x, own = jax.lax.scan(step, x, (arrays, own))
        else:
            run = eqx.filter_vmap(
                lambda layer, own, x: layer(x, own), in_axes=(eqx.if_array(0), 0, None)
            )
            x, own = run(self.layers, own, x)
            x = x.mean(0)
        return x, state.update(own)


SMALL = RNG.normal(1, 2, (16, 2, 2, 3)).astype(np.float32)
PARTS = [{"image": image} for image in np.split(SMALL, 2)]


def layers(library, how):
    if library == "linen":
        model = Lifted(how, alone=True)
        return clinic.linen(model, **model.init(jax.random.key(0), SMALL, False))
    if library == "nnx":
        return clinic.nnx(NnxLayers(how, nnx.Rngs(0)))
    if how == "one state":  # copies of one norm, which refer to the same averages
        model = EquinoxLayers(jax.random.key(0), how)
        return clinic.equinox(model, eqx.nn.State(model))
    return clinic.equinox(*eqx.nn.make_with_state(EquinoxLayers)(jax.random.key(0), how))


@pytest.mark.parametrize(
    ("library", "how"),
    [
        *(("linen", how) for how in ("scan", "vmap", "shared")),
        *(("nnx", how) for how in ("scan", "vmap", "shared", "averages")),
        *(("equinox", how) for how in ("shared", "one state")),
        *(SLOW("equinox", how) for how in ("scan", "vmap")),
    ],
)
def test_stacked_and_shared_norms_are_one_entry(library, how):
    network = layers(library, how)
    (layer,) = network.norms(PARTS[0])
    params = flatten_dict(network.params)
    kernels = [np.float64(leaf) for path, leaf in params.items() if path[-1] == "kernel"]
    if kernels[0].ndim == 3:
        (kernels,) = kernels
    x, given = np.float64(SMALL.reshape(2, 8, 12)), []  # two batches
    for kernel in kernels if len(kernels) > 1 else 2 * kernels:  # or one layer, called twice
        given.append(x @ kernel)
        if how != "vmap":
            y = given[-1] - given[-1].mean(1, keepdims=True)
            x = np.maximum(y / np.sqrt(given[-1].var(1, keepdims=True) + 1e-5), 0)
    is_stacked = how in ("scan", "vmap")
    given = np.stack(given).reshape(len(given) if is_stacked else 1, -1, 12)
    stats = flatten_dict(precise(network, PARTS).batch_stats)
    assert {path[:-1] for path in stats} == {layer.path}
    for name, wanted in (("mean", given.mean(1)), ("var", given.var(1))):
        found = stats[*layer.path, name]
        np.testing.assert_allclose(found, wanted.reshape(found.shape), rtol=1e-5, atol=1e-5)
    twice = () if is_stacked else ("updated-twice",)
    assert audit(network, PARTS).ids == ("never-updated", *twice)


class NnxDropping(nnx.Module):
    """What NNX keeps in a model: counts of random keys, flags, stacked layers, a cache."""

    def __init__(self, rngs):
        self.layers = NnxLayers("scan", rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(12, use_running_average=True, axis_name="devices", rngs=rngs)
        self.head, self.calls = nnx.Linear(12, 4, rngs=rngs), nnx.Variable(jnp.zeros((), int))

    def __call__(self, x):
        self.calls[...] += 1
        return self.head(self.norm(self.dropout(self.layers(x))))


def equinox_dropping(key):
    layers = eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(12, 12, key=key), norm_of(12)
    return eqx.nn.Sequential([*layers, eqx.nn.Dropout(0.5), norm_of(12)])


def bits(model):
    """Returns the structure of a model, with its flags, and its leaves in bytes."""
    if isinstance(model, nnx.Module):
        structure, leaves = nnx.split(model)
    else:  # an Equinox model with its state
        structure, leaves = jax.tree.structure(model[0]), eqx.filter(model, eqx.is_array)
    raw = [
        jax.random.key_data(of) if jax.dtypes.issubdtype(of.dtype, jax.dtypes.prng_key) else of
        for of in jax.tree.leaves(leaves)
    ]
    return structure, [(np.asarray(of).tobytes(), str(of.dtype)) for of in raw]


@pytest.mark.parametrize("library", ["nnx", SLOW("equinox")])
def test_the_users_model_stays_as_it_is_and_the_key_of_dropout_decides(library):
    if library == "nnx":
        model = NnxDropping(nnx.Rngs(0))
        network = clinic.nnx(model)
    else:
        model = eqx.nn.make_with_state(equinox_dropping)(jax.random.key(0))
        network = clinic.equinox(*model)
    before, batch = bits(model), {"image": SMALL, "label": np.arange(16) % 4}
    audit(network, [batch] * 2)
    jax.jit(clinic.gap)(network, batch)
    clinic.tent(network, [batch], tx=optax.sgd(0.1), jit=shared_jit)
    clinic.fold(network, SMALL)
    mended = precise(network, [batch])
    run = jax.jit(type(network).run, static_argnames="train")
    keys = map(jax.random.key, (0, 0, 1))
    first, again, other = (run(network, batch, train=True, dropout=key)[0] for key in keys)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    without = run(network, batch, train=False)[0]
    dropped = run(network, batch, train=False, dropout=jax.random.key(1))[0]
    np.testing.assert_array_equal(without, dropped)
    assert bits(model) == before
    # The new model differs in its statistics alone: Equinox also counts updates.
    structure, after = bits(mended.model if library == "nnx" else (mended.model, mended.state))
    assert structure == before[0]
    changed = sum(map(lambda old, new: old != new, before[1], after))
    assert changed == {"nnx": 4, "equinox": 6}[library]
