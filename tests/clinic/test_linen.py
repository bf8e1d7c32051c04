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

from bnjax import clinic
from bnjax.clinic import precise
from bnjax.clinic.linen import linen
from bnjax.clinic.network import Network, check, nothing_seen
from bnjax.models.convnet import ConvNet
from bnjax.norms import BatchNorm
from bnjax.train_step import TrainState, forward, init_state, init_variables, train_step

IMAGES = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)

NAMES = {
    "resnet": [
        "norm_init",
        "BasicBlock_0.BatchNorm_0",
        "BasicBlock_0.BatchNorm_1",
        "BasicBlock_1.BatchNorm_0",
        "BasicBlock_1.BatchNorm_1",
        "BasicBlock_1.norm_proj",
    ],
    "preact": ["BatchNorm_0", "BatchNorm_1", "BatchNorm_2", "BatchNorm_3", "last"],
    "scan": ["layers.BatchNorm_0"],
    "remat": ["layer0.BatchNorm_0", "layer1.BatchNorm_0"],
    "vmap": ["heads.BatchNorm_0"],
    "shared": ["Layer_0.BatchNorm_0"],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_norms_in_the_order_of_their_calls(name):
    model = NETWORKS[name]
    variables = drawn(model, IMAGES[:1])
    for train in (False, True):
        layers = linen(model, *variables).norms({"image": IMAGES}, train=train)
        assert [layer.name for layer in layers] == NAMES[name]
        assert {layer.by_batch for layer in layers} == {train}
        assert {layer.module.momentum for layer in layers} == {0.9}


@pytest.mark.parametrize("kind", ["same signature", "own signature"])
def test_a_norm_that_is_the_whole_model_and_on_another_axis(kind):
    x = np.random.default_rng(1).normal(3, 2, (5, 4, 3, 2)).astype(np.float32)
    norm = {"same signature": _Outer, "own signature": _Called}[kind](axis=1)
    params, stats = drawn(norm, x)
    network = linen(norm, params, stats)
    (layer,) = network.norms({"image": x})
    assert (layer.path, layer.axes) == ((), (0, 2, 3))
    observe = jax.jit(partial(Network.observe, mode="running"))
    _, seen = observe(network, nothing_seen(stats), {"image": x})
    (found,) = seen.values()
    np.testing.assert_allclose(found.mean, x.mean((0, 2, 3), np.float64), rtol=1e-6)
    np.testing.assert_allclose(found.var, x.var((0, 2, 3), np.float64), rtol=1e-6)
    assert (np.asarray(found.count) == 30).all()


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
    model, image = Synced(norm), IMAGES
    params, stats = jax.jit(partial(init_variables, model))(jax.random.key(0), image[:2])
    network, batches = clinic.linen(model, params, stats), [{"image": image}] * 2
    assert "never-updated" in clinic.audit(network, batches).ids
    mended = clinic.precise(network, [{"image": image}])
    convolved = jax.jit(nn.Conv(4, (3, 3)).apply)({"params": params["conv"]}, image)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(mended.batch_stats["norm"]["mean"], np.float64(convolved).mean((0, 1, 2)))
    close(mended.batch_stats["norm"]["var"], np.float64(convolved).var((0, 1, 2)))
    folded = clinic.fold(mended, image[:1])
    logits = [
        jax.jit(partial(forward, model=one.model, train=False))(
            one.params, one.batch_stats, {"image": image}
        )[0]
        for one in (mended, folded)
    ]
    assert not folded.batch_stats
    close(logits[0], logits[1])


def flagged(flag):
    """A network with this flag of training."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, **flags):
            train = flags[flag] is (flag not in ("deterministic", "use_running_average"))
            return nn.Dense(2)(nn.BatchNorm(use_running_average=not train)(x).mean((1, 2)))

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(name, kind) for name in ("self", "x", flag)]
    Net.__call__.__signature__ = inspect.Signature(names)
    return Net()


@pytest.mark.parametrize("flag", ["training", "deterministic", "use_running_average", "phase"])
def test_flags_of_other_names(flag):
    model = flagged(flag)
    variables = model.init(jax.random.key(0), IMAGES[:2], **{flag: False})
    if flag == "phase":
        with pytest.raises(ValueError, match=r"no training flag \(train"):
            clinic.linen(model, **variables)
        network = clinic.linen(
            model, **variables, call=lambda model, x, train: model(x, phase=train)
        )
    else:
        network = clinic.linen(model, **variables)
    for train in (False, True):
        assert network.norms({"image": IMAGES}, train=train)[0].by_batch is train
    mended = clinic.precise(network, [{"image": IMAGES}])
    (mean,) = (leaf["mean"] for leaf in mended.batch_stats.values())
    np.testing.assert_allclose(mean, IMAGES.mean((0, 1, 2)), rtol=1e-5)


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
    findings = clinic.audit(linen(model, state.params, new, **call), [batch] * 4)
    (entry,) = findings.not_checked
    assert not findings.healthy
    assert str(findings).endswith("nothing to audit")
    assert entry.missing.startswith("a batch norm of Flax, Equinox or bnjax, with `mean` and `var`")


def test_wrong_arguments_are_explained():
    model, x = nn.BatchNorm(), np.ones((4, 3), np.float32)
    variables = model.init(jax.random.key(0), x, use_running_average=True)
    for wrong in ((variables, variables["batch_stats"]), (variables["params"], variables)):
        with pytest.raises(ValueError, match=r"clinic\.linen\(model, \*\*variables\)"):
            linen(model, *wrong)
    with pytest.raises(ValueError, match=r"clinic\.linen\(model, params, batch_stats\)"):
        linen(model, variables["batch_stats"], variables["params"])
    for wrong in ((nn.BatchNorm, variables["params"]), (model, TrainState(0, {}, (), None))):
        with pytest.raises(ValueError, match=r"not .*(class BatchNorm|TrainState).*state\.params"):
            inspect.unwrap(linen)(*wrong, variables["batch_stats"])  # unchecked, as for users
    with pytest.raises(ValueError, match=r"not tuple.*'label': y"):
        check((x, np.zeros(4, np.int32)))  # as given to every function of the clinic
    with pytest.raises(ValueError, match=r"not dict with the keys \['images'\]"):
        check({"images": x})
    without_norms = ConvNet(
        filters=(4,), kernels=(3,), strides=(1,), dense=(), dropout=(), norm_dense=()
    )
    variables = init_variables(without_norms, jax.random.key(0), IMAGES)
    with pytest.raises(ValueError, match="a batch norm of Flax, Equinox or bnjax"):
        precise(linen(without_norms, variables[0], {"norm": {"ms": x}}), [{"image": IMAGES}])
