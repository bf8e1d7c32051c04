"""Networks of Equinox: the debiased averages, stacked and shared norms, and NumPy's float64."""

import functools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from patients import shared_jit
from test_precise import UNEVEN, Net, as_batches, assert_are, padded, truth, variables_of

from bnjax import clinic, compat

norm_of = functools.partial(eqx.nn.BatchNorm, axis_name="batch", mode="batch")


class Small(eqx.Module):
    """A norm of the images, a dense layer, a norm, and logits."""

    first: eqx.nn.BatchNorm
    dense: eqx.nn.Linear
    second: eqx.nn.BatchNorm
    logits: eqx.nn.Linear

    def __init__(self, key, **options):
        one, two = jax.random.split(key)
        self.first, self.second = norm_of(8, **options), norm_of(8, **options)
        self.dense = eqx.nn.Linear(8, 8, key=one)
        self.logits = eqx.nn.Linear(8, 4, key=two)

    def __call__(self, x, state):
        x, state = self.first(x.ravel(), state)
        x, state = self.second(self.dense(jax.nn.relu(x)), state)
        return self.logits(jax.nn.relu(x)), state


def data(seed, count, size=64):
    """Batches of images with 8 values, all of variance 0.211 in the whole set."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (512, 8, 1, 1))
    x = ((x - x.mean(0)) / x.std(0) * 0.211**0.5 + 0.2).astype(np.float32)
    rng = np.random.default_rng(seed)
    return np.stack([x[rng.permutation(512)[:size]] for _ in range(count)])


@functools.cache
def small(mode):
    return eqx.nn.make_with_state(Small)(jax.random.key(0), momentum=0.99, mode=mode)


@functools.cache
def training(mode):
    """Returns a function of the number of steps: the state after them; the weights stay."""
    model, start = small(mode)
    x = jnp.asarray(data(1, 600))

    @jax.jit
    def run(state, steps):
        def step(i, state):
            return jax.vmap(model, (0, None), (0, None), axis_name="batch")(x[i], state)[1]

        return jax.lax.fori_loop(0, steps, step, state)

    return functools.partial(run, start)


# By the number of steps: the variance that inference uses.
EFFECTIVE = {1: 99.2, 10: 9.67, 50: 1.74, 100: 0.79, 200: 0.37, 600: 0.213}


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_the_first_steps_of_debiased_averages(mode):
    """Equinox debiases an average of variances as if it started from 0, but it starts from 1."""
    model, _ = small(mode)
    audited = [{"image": x} for x in data(2, 4)]
    audit = functools.partial(clinic.audit, jit=shared_jit)
    for steps, effective in EFFECTIVE.items():
        state = training(mode)(steps)
        network = clinic.equinox(model, state)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-5)
        jax.tree.map(same, network.state, state)
        wanted = effective if mode == "batch" else 0.211
        tolerance = 0.03 if mode == "batch" else 0.15  # "ema" starts from the first batch
        var = np.mean(network.batch_stats["first"]["var"])
        np.testing.assert_allclose(var, wanted, rtol=tolerance)
        wrong = ("not-converged",) if mode == "batch" and steps < 600 else ()
        findings = audit(network, audited)
        assert findings.ids == wrong, f"{steps} steps\n{findings}"
        if wrong:
            assert [one.layers for one in findings.found] == [("first", "second")]
            mended = clinic.precise(network, audited, jit=shared_jit)
            assert audit(mended, audited).ids == ()
    # The logits of Equinox itself are those of the network.
    for one in (network, clinic.precise(network, audited, jit=shared_jit)):
        image = audited[0]["image"]
        np.testing.assert_allclose(by_equinox(one, image), evaluated(one, image), atol=1e-6)


def evaluated(network, image):
    run = shared_jit(functools.partial(type(network).run, train=False))
    return run(network, {"image": image})[0]


def by_equinox(network, image):
    """Logits in Equinox, without the clinic."""
    model, state = eqx.nn.inference_mode(network.model), network.state
    return jax.jit(jax.vmap(lambda x: model(x, state)[0], axis_name="batch"))(image)


class NetEquinox(eqx.Module):
    """The twin of `test_precise.Net`; images [h, w, c], as in linen."""

    conv: eqx.nn.Conv2d
    first: eqx.nn.BatchNorm
    dense: eqx.nn.Linear
    second: eqx.nn.BatchNorm
    logits: eqx.nn.Linear
    third: eqx.nn.BatchNorm

    def __init__(self, key, mode):
        norm = functools.partial(norm_of, eps=1e-3, mode=mode)
        self.conv = eqx.nn.Conv2d(2, 4, 3, key=key)
        self.first, self.second, self.third = norm(4), norm(7), norm(5)
        self.dense = eqx.nn.Linear(36, 7, key=key)
        self.logits = eqx.nn.Linear(7, 5, key=key)

    def __call__(self, x, state):
        x, state = self.first(self.conv(jnp.moveaxis(x, -1, 0)), state)
        x = jax.nn.relu(self.dense(jnp.moveaxis(jax.nn.relu(x), 0, -1).ravel()))
        x, state = self.second(x, state)
        return self.third(self.logits(x), state)


@pytest.mark.parametrize(
    ("mode", "by", "form"),
    [
        ("batch", "batch", padded),
        pytest.param("ema", "population", as_batches, marks=pytest.mark.slow),
        pytest.param("batch", "population", padded, marks=pytest.mark.slow),
        pytest.param("ema", "batch", padded, marks=pytest.mark.slow),
    ],
)
def test_precise_against_numpy_and_linen(mode, by, form):
    params, stats = variables_of(Net())
    network = clinic.equinox(*eqx.nn.make_with_state(NetEquinox)(jax.random.key(0), mode))
    stats = {name: {**network.batch_stats[name], **leaves} for name, leaves in stats.items()}
    network = network.replace(params=params, batch_stats=stats)
    batches = form(UNEVEN)
    mended = clinic.precise(network, batches, by=by)
    assert_are(mended.batch_stats, truth(params, UNEVEN, by))
    # In float64, because the layers of the two libraries sum in a different order.
    with compat.enable_x64(True):
        exact = jax.tree.map(in_float64, (network, params, stats, batches))
        mine = clinic.precise(exact[0], exact[3], by=by).batch_stats
        its = clinic.precise(clinic.linen(Net(), *exact[1:3]), exact[3], by=by).batch_stats
    for name, leaves in its.items():
        scale = np.asarray(leaves["var"]) + 1e-3
        for leaf, unit in (("mean", np.sqrt(scale)), ("var", scale)):
            apart = np.abs(mine[name][leaf] - leaves[leaf]) / unit
            assert apart.max() < 1e-6, (name, leaf)
    image = UNEVEN[0]
    logits, _ = mended.run({"image": image}, train=False)
    np.testing.assert_allclose(by_equinox(mended, image), logits, rtol=1e-5, atol=1e-5)


def in_float64(leaf):
    return leaf.astype(np.float64) if leaf.dtype == np.float32 else leaf


class Added(eqx.nn.BatchNorm):
    """A norm of a subclass that calls its superclass."""

    def __call__(self, x, state, **options):
        return super().__call__(x, state, **options)


class One(eqx.Module):
    """A dense layer and a norm, called by a function of (model, x, state)."""

    dense: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    through: object = eqx.field(static=True)

    def __init__(self, key, kind, through):
        self.dense, self.norm = eqx.nn.Linear(12, 5, key=key), kind(5)
        self.through = through

    def __call__(self, x, state):
        return self.through(self, x.ravel(), state)


def normal(model, x, state):
    return model.norm(model.dense(x), state)


ALL = np.random.default_rng(0).normal(1, 2, (16, 3, 2, 2)).astype(np.float32)
PARTS = [{"image": ALL[:6]}, {"image": ALL[6:]}]
CALLS = {
    "plain": (norm_of, normal),
    "axis in a tuple": (functools.partial(norm_of, axis_name=("batch",)), normal),
    "two axes": (functools.partial(norm_of, axis_name=("devices", "batch")), normal),
    "without affine": (functools.partial(norm_of, channelwise_affine=False), normal),
    "frozen": (functools.partial(norm_of, inference=True), normal),
    "subclass": (functools.partial(Added, axis_name="batch", mode="batch"), normal),
    "checkpoint": (norm_of, eqx.filter_checkpoint(normal)),
    "jit": (norm_of, eqx.filter_jit(normal)),
    "by keyword": (norm_of, lambda model, x, state: model.norm(x=model.dense(x), state=state)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_norm_is_seen_however_it_is_called(name):
    make = eqx.nn.make_with_state(functools.partial(One, kind=CALLS[name][0]))
    model, state = make(jax.random.key(0), through=CALLS[name][1])
    network = clinic.equinox(model, state)
    (layer,) = network.norms(PARTS[0])
    assert (layer.name, layer.shape, layer.axes, layer.by_batch) == ("norm", (6, 5), (0,), False)
    found = clinic.precise(network, PARTS)
    x = np.float64(ALL.reshape(16, -1)) @ np.float64(model.dense.weight).T
    x += np.float64(model.dense.bias)
    np.testing.assert_allclose(found.batch_stats["norm"]["mean"], x.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.batch_stats["norm"]["var"], x.var(0), rtol=1e-5)
    wanted = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    logits, _ = found.run({"image": ALL}, train=False)
    np.testing.assert_allclose(logits, wanted, atol=1e-4)


class Layer(eqx.Module):
    dense: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.dense, self.norm = eqx.nn.Linear(12, 12, key=key), norm_of(12)

    def __call__(self, x, state):
        x, state = self.norm(self.dense(x), state)
        return jax.nn.relu(x), state


class Layers(eqx.Module):
    """Three layers, called in one of several ways."""

    layers: eqx.Module
    how: str = eqx.field(static=True)

    def __init__(self, key, how):
        self.how, keys = how, jax.random.split(key, 3)
        if how in ("scan", "vmap"):
            self.layers = eqx.filter_vmap(Layer)(keys)
            return
        layers = [Layer(key) for key in keys]
        for i in (1, 2):
            layers[i] = eqx.tree_at(lambda one: one.norm, layers[i], layers[0].norm)
        self.layers = layers
        if how == "shared":
            self.layers = eqx.nn.Shared(
                layers,
                where=lambda layers: (layers[1].norm, layers[2].norm),
                get=lambda layers: (layers[0].norm, layers[0].norm),
            )

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
            axes = eqx.if_array(0), 0, None
            x, own = eqx.filter_vmap(lambda *of: of[0](of[2], of[1]), in_axes=axes)(
                self.layers, own, x
            )
            x = x.mean(0)
        return x, state.update(own)


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in ("scan", "vmap", "one state")]


@pytest.mark.parametrize("how", ["shared", *SLOW])
def test_stacked_and_shared_norms_are_one_entry(how):
    if how == "one state":  # copies of one norm, which refer to the same averages
        model = Layers(jax.random.key(0), how)
        state = eqx.nn.State(model)
    else:
        model, state = eqx.nn.make_with_state(Layers)(jax.random.key(0), how)
    network = clinic.equinox(model, state)
    (layer,) = network.norms(PARTS[0])
    found = clinic.precise(network, [{"image": ALL}])
    params = flatten_dict(network.params, sep=".")
    kernels, biases = (
        [np.float64(leaf) for name, leaf in params.items() if name.endswith(f"dense.{of}")]
        for of in ("kernel", "bias")
    )
    if how in ("scan", "vmap"):
        kernels, biases = kernels[0], biases[0]
    x, given = np.float64(ALL.reshape(16, -1)), []
    for kernel, bias in zip(kernels, biases, strict=True):
        given.append(x @ kernel + bias)
        if how != "vmap":
            y = (given[-1] - given[-1].mean(0)) / np.sqrt(given[-1].var(0) + 1e-5)
            x = np.maximum(y, 0)
    if how in ("shared", "one state"):
        given = np.concatenate(given)
        wanted = given.mean(0), given.var(0)
    else:
        wanted = np.mean(given, 1), np.var(given, 1)
    stats = flatten_dict(found.batch_stats)
    for leaf, of in zip(("mean", "var"), wanted, strict=True):
        np.testing.assert_allclose(stats[*layer.path, leaf], of, rtol=1e-5, atol=1e-5)
    assert len(stats) == 3  # with the count
    twice = ("updated-twice",) if how in ("shared", "one state") else ()
    assert clinic.audit(network, PARTS).ids == ("never-updated", *twice)
    logits, _ = found.run({"image": ALL}, train=False)
    np.testing.assert_allclose(by_equinox(found, ALL), logits, rtol=1e-5, atol=1e-5)


class Dropping(eqx.Module):
    layer: Layer
    dropout: eqx.nn.Dropout
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.layer, self.dropout, self.norm = Layer(key), eqx.nn.Dropout(0.5), norm_of(12)

    def __call__(self, x, state, *, key=None):
        x, state = self.layer(x.ravel(), state)
        return self.norm(self.dropout(x, key=key), state)


def bits(model, state):
    leaves = jax.tree.leaves((eqx.filter(model, eqx.is_array), state))
    return jax.tree.structure(model), [(np.asarray(of).tobytes(), of.dtype) for of in leaves]


@pytest.mark.slow
def test_the_users_model_stays_as_it_is_and_the_key_of_dropout_decides():
    model, state = eqx.nn.make_with_state(Dropping)(jax.random.key(0))
    before, network = bits(model, state), clinic.equinox(model, state)
    image = np.random.default_rng(1).normal(1, 2, (256, 3, 2, 2)).astype(np.float32)
    batches = [{"image": of, "label": np.arange(64) % 4} for of in np.split(image, 4)]
    audited = clinic.audit(network, batches, jit=shared_jit)
    assert audited.ids == ("never-updated", "variance-shift")
    clinic.gap(network, batches[0])
    clinic.tent(network, batches, tx=optax.sgd(0.1))
    clinic.fold(network, ALL[:2])
    mended = clinic.precise(network, batches)
    run = jax.jit(functools.partial(type(network).run, train=True))
    keys = map(jax.random.key, (0, 0, 1))
    first, again, other = (run(network, batches[0], dropout=key)[0] for key in keys)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert bits(model, state) == before
    # The new model differs in the mean, the variance and the count of its two norms alone.
    structure, after = bits(mended.model, mended.state)
    assert structure == before[0]
    assert sum(map(lambda old, new: old != new, before[1], after)) == 6


def test_padding_has_no_effect_on_an_adaptation():
    network = clinic.equinox(*eqx.nn.make_with_state(Dropping)(jax.random.key(0)))
    filled = np.concatenate([ALL[:6], np.full_like(ALL[:2], np.nan)])
    adapt = functools.partial(clinic.tent, network, tx=optax.sgd(0.1))
    padded_ = adapt([{"image": filled, "mask": np.arange(8) < 6}])
    whole = adapt([PARTS[0]])
    for one, other in zip(jax.tree.leaves(padded_), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="takes no `mask`"):
        clinic.audit(network, [{"image": filled, "mask": np.arange(8) < 6}])


class TwoAxes(eqx.Module):
    first: eqx.nn.BatchNorm
    second: eqx.nn.BatchNorm

    def __init__(self):
        self.first, self.second = norm_of(12), norm_of(12, axis_name="other")

    def __call__(self, x, state):
        x, state = self.first(x.ravel(), state)
        return self.second(x, state)


def test_norms_without_a_common_axis_need_a_call():
    model, state = eqx.nn.make_with_state(TwoAxes)()
    with pytest.raises(ValueError, match="no axis name in common"):
        clinic.equinox(model, state).norms(PARTS[0])

    def call(model, state, images, key):
        inner = jax.vmap(model, (0, None), (0, None), axis_name="batch")
        outer = jax.vmap(inner, (0, None), (0, None), axis_name="other")
        logits, state = outer(images.reshape(2, -1, *images.shape[1:]), state)
        return logits.reshape(len(images), -1), state

    network = clinic.equinox(model, state, call)
    assert [layer.name for layer in network.norms(PARTS[0])] == ["first", "second"]


def test_without_equinox_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match=r"pip install 'bnjax\[equinox\]'"):
        clinic.equinox(None, None)
