"""Frozen statistics and frozen scales and biases: nothing else changes, and these do not at all."""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from foreign import NETWORKS, drawn, shapes
from numpy_network import padded

from bnjax.clinic.freezing import affine_mask, freeze_statistics, moved, without_frozen
from bnjax.clinic.linen import linen
from bnjax.models.convnet import ConvNet
from bnjax.norms import BatchNorm
from bnjax.norms.variants import BatchRenorm, GhostBatchNorm
from bnjax.train_step import TrainState, eval_step, forward, train_step

RNG = np.random.default_rng(0)
BATCH = {"image": RNG.random((6, 8, 8, 3), np.float32), "label": np.arange(6)}
SGD = optax.sgd(0.1)
SLOW = partial(pytest.param, marks=pytest.mark.slow)  # says the same in other words
# The first norm of each.
FIRST = {
    "preact": "BatchNorm_0",
    "scan": "layers.*",
    "remat": "layer0.BatchNorm_?",
    "vmap": "*",
    "shared": "Layer_0.BatchNorm_0",
}


def same(a, b):
    """Whether each leaf of two trees is equal, by its path."""
    return flatten_dict(jax.tree.map(np.array_equal, dict(a), dict(b)))


def variables_of(name):
    return drawn(NETWORKS[name], BATCH["image"])


def stepped(model, params, stats, batch=BATCH):
    """Returns parameters and statistics after a step."""
    state = TrainState(jnp.int32(0), params, SGD.init(params), jax.random.key(1))
    state, after, _ = jax.jit(partial(train_step, model=model, tx=SGD))(state, stats, batch)
    return state.params, after


@pytest.mark.parametrize("name", ["scan", "shared", *map(SLOW, ("preact", "remat", "vmap"))])
def test_frozen_statistics_stay_and_the_others_move(name):
    frozen, variables = freeze_statistics(NETWORKS[name], FIRST[name]), variables_of(name)
    before, after = linen(frozen, *variables), linen(frozen, *stepped(frozen, *variables))
    norms = [layer.name for layer in before.norms(BATCH)]
    leaves = {f"{norm}.{leaf}" for norm in norms for leaf in ("mean", "var", "scale", "bias")}
    assert leaves - {*moved(before, after)} == {f"{norms[0]}.mean", f"{norms[0]}.var"}


def test_trees_fields_and_evaluation_are_the_models_own():
    model = NETWORKS["scan"]
    frozen, variables = freeze_statistics(model, "*"), variables_of("scan")
    assert shapes(frozen, BATCH["image"]) == jax.eval_shape(lambda: variables)
    assert isinstance(frozen, type(model))
    assert all(getattr(frozen, f.name) == getattr(model, f.name) for f in dataclasses.fields(model))
    results = [jax.jit(partial(eval_step, model=one))(*variables, BATCH) for one in (model, frozen)]
    assert jax.tree.leaves(results[0]) == jax.tree.leaves(results[1])
    for train in (False, True):
        layers = linen(frozen, *variables).norms(BATCH, train=train)
        assert not any(layer.by_batch for layer in layers)


class Net(nn.Module):
    """One norm, and logits of its output."""

    norm: Callable[..., nn.Module]
    in_call: bool

    @nn.compact
    def __call__(self, x, train):
        given = not train if self.in_call else None
        norm = self.norm(use_running_average=None if self.in_call else not train)
        return nn.Dense(3, name="logits")(norm(x.reshape(len(x), -1), given))


@pytest.mark.parametrize(
    ("norm", "in_call"),
    [
        (nn.BatchNorm, False),
        (partial(BatchNorm, debias=True, statistics="batch", update_average=True), True),
        SLOW(nn.BatchNorm, True),
        SLOW(partial(GhostBatchNorm, virtual_batch=2), True),
        SLOW(BatchRenorm, True),
    ],
)
def test_the_gradient_takes_frozen_statistics_as_constants(norm, in_call):
    model = freeze_statistics(Net(norm, in_call), "*")
    x = RNG.normal(2, 3, (8, 1, 1, 4)).astype(np.float32)
    weights = RNG.normal(0, 1, (8, 3)).astype(np.float32)
    params, stats = drawn(model, x)
    (name,) = stats
    mean, var, scale = stats[name]["mean"], stats[name]["var"], params[name]["scale"]

    def loss(params, x):
        logits, written = forward(params, stats, {"image": x}, model=model, train=True)
        return (logits * weights).sum(), written["batch_stats"]

    grads, written = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    assert all(same(stats, written).values())
    inverse = 1 / np.sqrt(np.float64(var) + 1e-5)
    back = np.float64(weights) @ np.float64(params["logits"]["kernel"]).T
    hat = (np.float64(x[:, 0, 0]) - mean) * inverse
    # Sums of 8 products of size 10 in float32.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
    close(grads[1][:, 0, 0], back * scale * inverse)
    close(grads[0][name]["scale"], (back * hat).sum(0))
    close(grads[0][name]["bias"], back.sum(0))
    y = hat * scale + params[name]["bias"]
    close(grads[0]["logits"]["kernel"], y.T @ np.float64(weights))


def test_a_mask_stays():
    """Of two norms one is frozen; padding changes neither the step nor the other's averages."""
    model = ConvNet((4,), (3,), (2,), (8,), 10, nn.BatchNorm, norm_dense=(True,), dropout=(0.0,))
    frozen, variables = freeze_statistics(model, "dense0_norm"), drawn(model, BATCH["image"])
    plain, masked = (
        stepped(frozen, *variables, batch | {"label": np.zeros(len(batch["image"]), int)})
        for batch in (BATCH, padded(BATCH["image"]))
    )
    # 8 images' activations of size 1, summed in another order.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), plain, masked)
    kept = same(variables[1], masked[1])
    assert {path[0] for path in kept if kept[path]} == {"dense0_norm"}


def test_what_matches_nothing_is_an_error_with_the_names():
    model = NETWORKS["preact"]
    params, stats = variables_of("preact")
    run = partial(forward, params, stats, BATCH, train=True)
    with pytest.raises(ValueError, match=r"'batch\*'.*: BatchNorm_0, .*, last\."):
        run(model=freeze_statistics(model, "last", "batch*"))
    with pytest.raises(ValueError, match=r"'Conv_0'.*: BatchNorm_0, .*, last\."):
        affine_mask(params, stats, "Conv_0")
    with pytest.raises(ValueError, match="no pattern was given"):
        affine_mask(params, stats)


def test_frozen_scales_and_biases_stay_and_the_others_move_as_before():
    params, stats = variables_of("preact")
    tx = optax.adamw(0.1, weight_decay=0.1)

    def two_steps(tx):
        state, new = tx.init(params), params
        for _ in range(2):
            grads = jax.tree.map(lambda leaf: 2 + jnp.sin(leaf), new)
            updates, state = jax.jit(tx.update)(grads, state, new)
            new = optax.apply_updates(new, updates)
        return new

    plain, ours = two_steps(tx), two_steps(without_frozen(tx, affine_mask(params, stats, "last")))
    frozen = {("last", "scale"), ("last", "bias")}
    assert {path for path, unchanged in same(params, ours).items() if unchanged} == frozen
    assert {path for path, equal in same(plain, ours).items() if not equal} == frozen
