"""Vital signs agree with what precise statistics and evaluation say; the assertion asserts."""

from functools import partial

import equinox as eqx
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from patients import ILL, given_to_first, plain
from zoo.kit import audit, precise

from bnjax import clinic
from bnjax.train_step import eval_step

HEALTHY, BATCHES = plain(0).network, plain(0).batches


def loss_of(network, batch):
    variables = network.params, network.batch_stats
    return jax.jit(lambda: eval_step(*variables, batch, model=network.model))().means()["loss"]


def test_vital_signs_are_those_of_evaluation_with_three_statistics():
    batch = BATCHES[0]
    halves = [{name: leaf[i::2] for name, leaf in batch.items()} for i in (0, 1)]
    found = clinic.vitals(HEALTHY, batch)
    assert all(type(value) is float for value in found.values())
    crossed = [
        loss_of(precise(HEALTHY, [other]), half) for half, other in (halves, reversed(halves))
    ]
    losses = {
        "stored": loss_of(HEALTHY, batch),
        "batch": loss_of(precise(HEALTHY, [batch]), batch),
        "precise": np.mean(crossed),
    }
    for name, loss in losses.items():
        np.testing.assert_allclose(found[f"loss/{name}"], loss, rtol=1e-4)
    given, stored = given_to_first(HEALTHY, batch), HEALTHY.batch_stats["first"]
    std = np.sqrt(given.var(0) + 1e-5)
    drift = np.sqrt(np.mean(((stored["mean"] - given.mean(0)) / std) ** 2))
    np.testing.assert_allclose(found["drift/first.mean"], drift, rtol=1e-3)
    ratio = np.log((stored["var"] + 1e-5) / std**2).mean()
    np.testing.assert_allclose(found["drift/first.variance"], ratio, atol=1e-5)
    with pytest.raises(ValueError, match="drop one"):
        clinic.vitals(HEALTHY, {name: leaf[:7] for name, leaf in batch.items()})


class Flagged(nn.Module):
    @nn.compact
    def __call__(self, x, training):
        return nn.BatchNorm(not training)(nn.Dense(4)(flat(x)))


class WithoutNorm(nn.Module):
    def __call__(self, x, train):
        return x.mean((1, 2))


def flagged(scale):
    variables = Flagged().init(jax.random.key(0), BATCHES[0]["image"] / 255.0, training=False)
    return clinic.linen(Flagged(), **jax.tree.map(lambda leaf: scale * leaf, variables))


def flat(x):
    return x.reshape(len(x), -1)


def of_nnx(scale=0.0):
    dense, norm = nnx.Linear(192, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    norm.mean[...] += scale
    return clinic.nnx(nnx.Sequential(flat, dense, norm))


@pytest.mark.parametrize("network", [flagged, of_nnx])
def test_vital_signs_are_compiled_once_for_other_variables(network):
    traced = []

    def loss_fn(logits, label):
        traced.append(logits.shape)
        return optax.softmax_cross_entropy_with_integer_labels(logits, label)

    one = clinic.vitals(network(1.0), BATCHES[0], loss_fn=loss_fn)
    programs = len(traced)
    other = clinic.vitals(network(2.0), BATCHES[1], loss_fn=loss_fn)
    assert len(traced) == programs
    assert one["loss/stored"] != other["loss/stored"]


def of_equinox(mode):
    """A norm on the pixels."""
    norm = eqx.nn.make_with_state(eqx.nn.BatchNorm)(192, "batch", momentum=0.9, mode=mode)
    each = partial(jax.vmap, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return clinic.equinox(*norm, lambda model, state, x, _: each(model)(x.reshape(-1, 192), state))


def stepped(passes, network, batch):
    """Runs passes of different images in training mode, as a user's loop does."""
    model = network.model
    if isinstance(model, nnx.Module):
        model.train()
        for i in range(passes):
            model(batch["image"] / (255.0 + i))
        return clinic.nnx(model)
    model, state = eqx.nn.inference_mode(model, False), network.state
    for i in range(passes):
        _, state = network.call(model, state, batch["image"] / (255.0 + i), None)
    return clinic.equinox(model, state, network.call)


SLOW = [
    pytest.param(partial(of_equinox, mode), marks=pytest.mark.slow) for mode in ("ema", "batch")
]


@pytest.mark.parametrize("initial", [of_nnx, *SLOW])
def test_what_a_user_did_between_two_networks(initial):
    initial = initial()
    assert audit(initial, BATCHES).ids == ("never-updated",)
    network = precise(stepped(1, initial, BATCHES[0]), BATCHES)
    for passes, found in ((1, ()), (2, ("updated-twice",))):
        run = clinic.Run(step=partial(stepped, passes))
        assert audit(network, BATCHES, run).ids == found
    after = stepped(1, network, BATCHES[0])
    assert {leaf.split(".")[-1] for leaf in clinic.moved(network, after)} >= {"mean", "var"}
    run = clinic.Run(before=network, frozen=("*",))
    assert audit(after, BATCHES, run).ids == ("moved-while-frozen",)


def test_a_healthy_network_passes_and_an_ill_one_is_described():
    clinic.assert_healthy(HEALTHY, BATCHES, run=plain(0).run)
    with pytest.raises(AssertionError, match="weight-decay"):
        clinic.assert_healthy(HEALTHY, BATCHES, run=clinic.Run(tx=optax.adamw(0.1)))
    ill = ILL["scales of 0"][1](0).network
    said = r"(?s)dead-channels.*second: 4 of 16 channels.*to fix it.*allow=\('dead-channels',\)"
    with pytest.raises(AssertionError, match=said):
        clinic.assert_healthy(ill, BATCHES)
    clinic.assert_healthy(ill, BATCHES, allow="dead-channels")
    with pytest.raises(ValueError, match=r"\['small-batches'\]; known names are .*small-batch"):
        clinic.assert_healthy(ill, BATCHES, allow=["small-batches"])
    # A network that cannot be audited is not healthy, whatever is allowed.
    with pytest.raises(AssertionError, match=r"not checked: stale by fit; .* a second batch"):
        clinic.assert_healthy(HEALTHY, BATCHES[:1])
    with pytest.raises(AssertionError, match="a checkpoint that fits the model"):
        clinic.assert_healthy(ill.replace(batch_stats={}), BATCHES, allow="missing-statistics")


def test_a_network_without_norms_has_no_vital_signs():
    with pytest.raises(ValueError, match="nothing to measure: this needs a batch norm"):
        clinic.vitals(clinic.linen(WithoutNorm(), {}, {}), BATCHES[0])
