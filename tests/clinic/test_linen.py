"""Networks of other people: their norms, their inputs, and how they are run."""

import inspect
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from flax import nnx
from foreign import NETWORKS, drawn
from seen import assert_moments
from zoo.kit import audit, precise, predicting

from bnjax import clinic
from bnjax.clinic.linen import linen
from bnjax.clinic.network import Network, check, nothing_seen
from bnjax.norms import BatchNorm
from bnjax.train_step import TrainState, init_state, init_variables, train_step

IMAGES = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)

BLOCKS = "BasicBlock_0.BatchNorm_0 BasicBlock_0.BatchNorm_1 BasicBlock_1.BatchNorm_0"
NAMES = {
    "resnet": f"norm_init {BLOCKS} BasicBlock_1.BatchNorm_1 BasicBlock_1.norm_proj",
    "preact": "BatchNorm_0 BatchNorm_1 BatchNorm_2 BatchNorm_3 last",
    "scan": "layers.BatchNorm_0",
    "remat": "layer0.BatchNorm_0 layer1.BatchNorm_0",
    "vmap": "heads.BatchNorm_0",
    "shared": "Layer_0.BatchNorm_0",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_in_the_order_of_their_calls(name):
    network = linen(NETWORKS[name], *drawn(NETWORKS[name], IMAGES[:1]))
    for train in (False, True):
        layers = network.norms({"image": IMAGES}, train=train)
        assert " ".join(layer.name for layer in layers) == NAMES[name]
        assert {(layer.by_batch, layer.module.momentum) for layer in layers} == {(train, 0.9)}


class _Called(BatchNorm):
    """A norm that is the whole model: it extends another, and is called in another way."""

    def __call__(self, x, *, train, mask=None):
        return super().__call__(x, not train, mask=mask).mean((1, 2))


class _Extended(nn.BatchNorm):
    """One that is called as the norm that it extends, which is not to count twice."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(2 * x / 2, use_running_average, mask=mask)


class _Outer(nn.Module):
    axis: int

    @nn.compact
    def __call__(self, x, train):
        norm = _Extended(axis=self.axis)
        nn.share_scope(self, norm)
        return norm(x, not train).mean((1, 2))


@pytest.mark.parametrize("norm", [_Outer(axis=1), _Called(axis=1)])
def test_a_norm_that_is_the_whole_model_and_on_another_axis(norm):
    x = np.random.default_rng(1).normal(3, 2, (5, 4, 3, 2)).astype(np.float32)
    network = linen(norm, *drawn(norm, x))
    (layer,) = network.norms({"image": x})
    assert (layer.path, layer.axes) == ((), (0, 2, 3))
    observe = jax.jit(partial(Network.observe, mode="running"))
    _, seen = observe(network, nothing_seen(network.batch_stats), {"image": x})
    (found,) = seen.values()
    np.testing.assert_allclose(found.mean, x.mean((0, 2, 3), np.float64), rtol=1e-6)
    np.testing.assert_allclose(found.var, x.var((0, 2, 3), np.float64), rtol=1e-6)
    assert (np.asarray(found.count) == 30).all()


class Synced(nn.Module):
    """A network for `jax.pmap` or `jax.shard_map`, as in Flax's ImageNet example."""

    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        norm = partial(self.norm, use_running_average=not train, momentum=0.5, axis_name="batch")
        x = norm(name="norm")(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(2, name="logits")(nn.relu(x).mean((1, 2)))


@pytest.mark.parametrize("norm", [nn.BatchNorm, partial(BatchNorm, average_axis_name="groups")])
def test_synced_norms_are_run_outside_of_their_axis(norm):
    model, batch = Synced(norm), {"image": IMAGES}
    variables = jax.jit(partial(init_variables, model))(jax.random.key(0), IMAGES[:2])
    network = clinic.linen(model, *variables)
    assert "never-updated" in audit(network, [batch] * 2).ids
    mended = precise(network, [batch])
    x = jax.jit(nn.Conv(4, (3, 3)).apply)({"params": network.params["conv"]}, IMAGES)
    assert_moments(mended.batch_stats["norm"], x, rtol=1e-4, atol=1e-5)
    folded = clinic.fold(mended, IMAGES[:1])
    assert not folded.batch_stats
    logits = (predicting(one, train=False)(IMAGES) for one in (mended, folded))
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


class Flagged(nn.Module):
    """A network whose `__call__` has the argument `flag`."""

    flag: str

    @nn.compact
    def __call__(self, x, **flags):
        train = flags[self.flag] is (self.flag not in ("deterministic", "use_running_average"))
        return nn.Dense(2)(nn.BatchNorm(use_running_average=not train)(x).mean((1, 2)))


@pytest.mark.parametrize("flag", ["training", "deterministic", "use_running_average", "phase"])
def test_flags_of_other_names(flag, monkeypatch):
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(name, kind) for name in ("self", "x", flag)]
    monkeypatch.setattr(Flagged.__call__, "__signature__", inspect.Signature(names), raising=False)
    variables = Flagged(flag).init(jax.random.key(0), IMAGES[:2], **{flag: False})
    options = {}
    if flag == "phase":
        with pytest.raises(ValueError, match=r"no training flag \(train"):
            clinic.linen(Flagged(flag), **variables)
        options = {"call": lambda model, x, train: model(x, phase=train)}
    network = clinic.linen(Flagged(flag), **variables, **options)
    for train in (False, True):
        assert network.norms({"image": IMAGES}, train=train)[0].by_batch is train
    mended = precise(network, [{"image": IMAGES}])
    assert_moments(mended.batch_stats["BatchNorm_0"], IMAGES)


class OfNnx(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.logits = nnx.BatchNorm(3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x, train):
        return self.logits(self.norm(x, use_running_average=not train).mean((1, 2)))


def test_a_model_of_nnx_trains_and_what_cannot_be_checked_is_said():
    model, tx, batch = nnx.bridge.ToLinen(OfNnx), optax.sgd(0.1), {"image": IMAGES}
    batch |= {"label": np.arange(6) % 3}
    state, stats = jax.jit(partial(init_state, model, tx))(jax.random.key(0), IMAGES)
    _, new, _ = jax.jit(partial(train_step, model=model, tx=tx))(state, stats, batch)
    np.testing.assert_allclose(new["norm"]["mean"], 0.01 * IMAGES.mean((0, 1, 2)), rtol=1e-5)
    call = {"call": lambda model, x, train: model(x, train=train)}
    findings = audit(linen(model, state.params, new, **call), [batch] * 4)
    (entry,) = findings.not_checked
    assert not findings.healthy
    assert str(findings).endswith("nothing to audit")
    assert entry.missing.startswith("a batch norm of Flax, Equinox or bnjax, with `mean` and `var`")


def test_wrong_arguments_are_explained():
    model, x = nn.BatchNorm(), np.ones((4, 3), np.float32)
    variables = model.init(jax.random.key(0), x, use_running_average=True)
    params, stats = variables["params"], variables["batch_stats"]
    for wrong, words in (
        ((model, variables, stats), r"clinic\.linen\(model, \*\*variables\)"),
        ((model, params, variables), r"clinic\.linen\(model, \*\*variables\)"),
        ((model, stats, params), r"clinic\.linen\(model, params, batch_stats\)"),
        ((nn.BatchNorm, params, stats), r"not the class BatchNorm.*state\.params"),
        ((model, TrainState(0, {}, (), None), stats), r"not .*TrainState.*state\.params"),
    ):
        with pytest.raises(ValueError, match=words):
            inspect.unwrap(linen)(*wrong)  # unchecked, as for users
    for batch, words in (
        ((x, np.zeros(4, np.int32)), r"not tuple.*'label': y"),
        ({"images": x}, r"not dict with the keys \['images'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            check(batch)  # as given to every function of the clinic
    without_norms = linen(
        nn.Dense(1), params, {"norm": {"ms": x}}, lambda model, x, train: x[:, 0, 0]
    )
    with pytest.raises(ValueError, match="a batch norm of Flax, Equinox or bnjax"):
        precise(without_norms, [{"image": IMAGES}])
