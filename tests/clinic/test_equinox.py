"""Networks of Equinox: debiased averages, norms in all calls, padding, and axes."""

import functools
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo.kit import shared_jit

from bnjax import clinic

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
    model, start = eqx.nn.make_with_state(Small)(jax.random.key(0), momentum=MOMENTUM, mode=mode)
    x, audited = jnp.asarray(data(1, 600)), [{"image": x} for x in data(2, 4)]
    audit, precise = (
        functools.partial(of, jit=shared_jit) for of in (clinic.audit, clinic.precise)
    )

    each = functools.partial(jax.vmap, in_axes=(0, None), out_axes=(0, None), axis_name="batch")

    @jax.jit
    def run(state, steps):
        return jax.lax.fori_loop(0, steps, lambda i, state: each(model)(x[i], state)[1], state)

    for steps in (1, 10, 50, 200, 600):
        state = run(start, steps)
        network = clinic.equinox(model, state)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), network.state, state)
        rest = MOMENTUM**steps  # the weight of the initial value, 1
        wanted = VAR + rest / (1 - rest) if mode == "batch" else VAR
        tolerance = 0.03 if mode == "batch" else 0.15  # "ema" starts from the first batch
        found = np.mean(network.batch_stats["first"]["var"])
        np.testing.assert_allclose(found, wanted, rtol=tolerance)
        wrong = ("not-converged",) if mode == "batch" and steps < 600 else ()
        findings = audit(network, audited)
        assert findings.ids == wrong, f"{steps} steps\n{findings}"
        if wrong:
            assert [one.layers for one in findings.found] == [("first", "second")]
            assert audit(precise(network, audited), audited).ids == ()
    # One more step in Equinox, on the images of precise statistics, leaves these as they are.
    image = audited[0]["image"]
    for before in (clinic.equinox(model, start), network):  # without updates, and with 600
        mended = precise(before, audited[:1])
        _, state = each(mended.model)(image, mended.state)
        after = clinic.equinox(mended.model, state).batch_stats["first"]
        for name in ("mean", "var"):
            np.testing.assert_allclose(after[name], mended.batch_stats["first"][name], rtol=1e-5)
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


def test_padding_has_no_effect_on_an_adaptation():
    network = clinic.equinox(*eqx.nn.make_with_state(One)(jax.random.key(0), norm_of, normal))
    filled = np.concatenate([ALL[:6], np.full_like(ALL[:2], np.nan)])
    batch = {"image": filled, "mask": np.arange(8) < 6}
    padded, whole = (clinic.tent(network, [of], tx=optax.sgd(0.1)) for of in (batch, PARTS[0]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), padded, whole)
    with pytest.raises(ValueError, match="takes no `mask`"):
        clinic.audit(network, [batch])


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
