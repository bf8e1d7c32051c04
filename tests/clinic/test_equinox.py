"""Networks of Equinox: debiased averages, norms in all calls, padding, and axes."""

import functools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy_network import padded
from seen import assert_norm_is_seen
from zoo.kit import audit, precise

from bnjax import clinic

norm_of = functools.partial(eqx.nn.BatchNorm, axis_name="batch", mode="batch")


def small(key, **options):
    """A norm of the images, a dense layer, a norm, and logits."""
    one, two = jax.random.split(key)
    relu = eqx.nn.Lambda(jax.nn.relu)
    layers = eqx.nn.Lambda(jnp.ravel), norm_of(8, **options), relu, eqx.nn.Linear(8, 8, key=one)
    return eqx.nn.Sequential([*layers, norm_of(8, **options), relu, eqx.nn.Linear(8, 4, key=two)])


MOMENTUM, VAR = 0.99, 0.211


def data(seed, count, size=64):
    """Batches of images with 8 values, all of variance 0.211 in the whole set."""
    x = np.random.default_rng(0).normal(0, 1, (512, 8, 1, 1))
    x = ((x - x.mean(0)) / x.std(0) * VAR**0.5 + 0.2).astype(np.float32)
    rng = np.random.default_rng(seed)
    return np.stack([x[rng.permutation(512)[:size]] for _ in range(count)])


@pytest.mark.parametrize("mode", ["batch", "ema"])
def test_the_first_steps_of_debiased_averages(mode):
    """Equinox debiases an average of variances as if it started from 0, but it starts from 1."""
    model, start = eqx.nn.make_with_state(small)(jax.random.key(0), momentum=MOMENTUM, mode=mode)
    x, audited = jnp.asarray(data(1, 600)), [{"image": x} for x in data(2, 4)]
    each = functools.partial(jax.vmap, in_axes=(0, None), out_axes=(0, None), axis_name="batch")

    @jax.jit
    def run(state, steps):
        return jax.lax.fori_loop(0, steps, lambda i, state: each(model)(x[i], state)[1], state)

    def first_of(network):
        return network.batch_stats["layers"]["1"]

    for steps in (1, 200, 600):
        state = run(start, steps)
        network = clinic.equinox(model, state)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), network.state, state)
        rest = MOMENTUM**steps  # the weight of the initial value, 1
        wanted = VAR + rest / (1 - rest) if mode == "batch" else VAR
        tolerance = 0.03 if mode == "batch" else 0.15  # "ema" starts from the first batch
        np.testing.assert_allclose(np.mean(first_of(network)["var"]), wanted, rtol=tolerance)
        findings = audit(network, audited)
        if mode == "batch" and steps < 600:
            assert findings.ids == ("not-converged",), findings
            assert findings.found[0].layers == ("layers.1", "layers.4")
            assert audit(precise(network, audited), audited).ids == ()
        else:
            assert findings.ids == (), findings
    assert network.norms(audited[0], train=True)[0].by_batch is (mode == "batch")
    # One more step in Equinox, on the images of precise statistics, leaves these as they are.
    image = audited[0]["image"]
    for before in (clinic.equinox(model, start), network):  # without updates, and with 600
        mended = precise(before, audited[:1])
        _, state = each(mended.model)(image, mended.state)
        pair = first_of(clinic.equinox(mended.model, state)), first_of(mended)
        for name in ("mean", "var"):
            np.testing.assert_allclose(*(one[name] for one in pair), rtol=1e-5)
    # The logits of Equinox itself are those of the network.
    for one in (network, mended):
        logits, _ = each(eqx.nn.inference_mode(one.model))(image, one.state)
        np.testing.assert_allclose(logits, one.run(audited[0], train=False)[0], atol=1e-6)


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
    kind, through = CALLS[name]
    made = eqx.nn.make_with_state(One)(jax.random.key(0), kind, through)
    assert_norm_is_seen(clinic.equinox(*made), ALL)


def test_padding_has_no_effect_on_an_adaptation():
    network = clinic.equinox(*eqx.nn.make_with_state(One)(jax.random.key(0), norm_of, normal))
    batches = padded(ALL[:6]), {"image": ALL[:6]}
    pair = (clinic.tent(network, [batch], tx=optax.sgd(0.1)) for batch in batches)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), *pair)
    with pytest.raises(ValueError, match="takes no `mask`"):
        audit(network, batches[:1])


def test_norms_without_a_common_axis_need_a_call():
    layers = eqx.nn.Lambda(jnp.ravel), norm_of(12), norm_of(12, axis_name="other")
    model, state = eqx.nn.make_with_state(eqx.nn.Sequential)(layers)
    with pytest.raises(ValueError, match="no axis name in common"):
        clinic.equinox(model, state).norms({"image": ALL})

    def call(model, state, images, key):
        inner = jax.vmap(model, (0, None), (0, None), axis_name="batch")
        outer = jax.vmap(inner, (0, None), (0, None), axis_name="other")
        logits, state = outer(images.reshape(2, -1, *images.shape[1:]), state)
        return logits.reshape(len(images), -1), state

    norms = clinic.equinox(model, state, call).norms({"image": ALL})
    assert [layer.name for layer in norms] == ["layers.1", "layers.2"]


def test_without_equinox_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(ImportError, match=r"pip install 'bnjax\[equinox\]'"):
        clinic.equinox(None, None)
