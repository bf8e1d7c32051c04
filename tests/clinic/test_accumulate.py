"""Steps over micro-batches, against NumPy in float64 and against the whole batch."""

import functools
import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpy_network import EPSILON, MOMENTUM, Tiny
from wrappers import DEVICES, WRAPPERS, close, wrap

from bnjax import norms
from bnjax.clinic.accumulation import accumulated_step
from bnjax.clinic.freezing import freeze_statistics
from bnjax.train_step import init_state, train_step

pytestmark = pytest.mark.lane


RATE, MICRO = 0.1, 3
SGD, SMALLER = (optax.sgd(rate, momentum=0.9) for rate in (RATE, RATE / 10))
SLOW = partial(pytest.param, marks=pytest.mark.slow)  # says the same in other words
# 24 examples; micro-batch 0 has 8 real ones, 1 has 5, and 2 has 7: rows 0, 3, 6, … are its.
MASKS = {"whole": None, "uneven": ~np.isin(np.arange(24), [1, 4, 7, 23])}


def batch_of(step=0, mask=None, shape=(2, 2, 1), examples=24):
    rng = np.random.default_rng(step)
    drift = np.arange(examples).reshape(-1, *[1] * len(shape)) / 8  # micro-batches differ in mean
    image = rng.normal(rng.integers(0, 4, examples).reshape(drift.shape), 1, (examples, *shape))
    batch = {"image": (image + drift).astype(np.float32), "label": rng.integers(0, 3, examples)}
    return batch if mask is None else batch | {"mask": mask}


def part(batch, i):
    return {name: leaf[i::MICRO] for name, leaf in batch.items()}


def start(model, tx=SGD, shape=(2, 2, 1)):
    images = np.zeros((2, *shape), np.float32)
    return jax.device_get(jax.jit(partial(init_state, model, tx))(jax.random.PRNGKey(0), images))


def step_of(model, tx=SGD, micro_batches=MICRO, **options):
    options = {"micro_batches": micro_batches, "model": model, "tx": tx} | options
    return jax.jit(partial(accumulated_step, **options))


def by_hand(kernel, bias, batch):
    """Loss and gradient of Tiny over the real examples of a micro-batch, summed, in float64."""
    real = batch.get("mask", np.ones(len(batch["label"]), bool))
    x, label = batch["image"][real].reshape(real.sum(), -1).astype(np.float64), batch["label"][real]
    normal = (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)
    logits = normal @ kernel + bias
    score = np.exp(logits - logits.max(1, keepdims=True))
    score /= score.sum(1, keepdims=True)
    slope = score - np.eye(3)[label]
    losses = -np.log(score[np.arange(len(label)), label])
    return losses.sum(), normal.T @ slope, slope.sum(0), (logits.argmax(1) == label).sum()


@pytest.mark.parametrize("mask", MASKS)
def test_a_step_equals_float64_by_hand(mask):
    state, stats = start(Tiny())
    batch = batch_of(mask=MASKS[mask])
    new, _, metrics = step_of(Tiny())(state, stats, batch)
    dense = jax.tree.map(np.float64, state.params["dense"])
    found = [by_hand(dense["kernel"], dense["bias"], part(batch, i)) for i in range(MICRO)]
    loss, kernel, bias, correct = (sum(terms) for terms in zip(*found, strict=True))
    real = batch.get("mask", np.ones(24, bool))
    count = real.sum()
    for name, slope in (("kernel", kernel), ("bias", bias)):
        np.testing.assert_allclose(
            new.params["dense"][name], dense[name] - RATE * slope / count, rtol=1e-5, atol=1e-6
        )
    np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
    assert (int(metrics.correct), int(metrics.count)) == (correct, count)
    assert (int(new.step), int(metrics.skipped)) == (1, 0)


def test_one_micro_batch_is_the_usual_step_to_the_bit():
    args = *start(Dropped()), batch_of(mask=MASKS["uneven"])
    usual = jax.jit(partial(train_step, model=Dropped(), tx=SGD))
    pair = usual(*args), step_of(Dropped(), micro_batches=1)(*args)
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(pair))


@pytest.mark.parametrize(
    "norm",
    [
        partial(nn.BatchNorm, momentum=0.75),
        partial(norms.BatchNorm, momentum=0.75, debias=True, variance="unbiased"),
        partial(norms.BatchNorm, momentum=0.75, statistics="running", update_average=True),
        SLOW(partial(norms.BatchNorm, momentum=None)),
        SLOW(partial(norms.BatchNorm, momentum=lambda count: 0.5 + count / 10)),
        SLOW(partial(norms.GhostBatchNorm, momentum=0.75, virtual_batch=4)),
    ],
)
def test_statistics_of_the_input_are_those_of_the_whole_batch(norm):
    """Whatever the norm: its input does not depend on how the batch was divided up."""
    model = Tiny(norm)
    usual, accumulated = jax.jit(partial(train_step, model=model, tx=SGD)), step_of(model)
    carried, others = start(model), start(model)
    # Fewer than two real values leave bnjax's averages as they are.
    little = [] if norm.func is nn.BatchNorm else [np.arange(24) < 1, np.arange(24) < 2]
    for mask in (MASKS["uneven"], *little):
        batch = batch_of(int(mask.sum()), mask)
        *carried, metrics = accumulated(*carried, batch)
        *others, _ = usual(*others, batch)
        assert int(metrics.count) == mask.sum()
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), carried[1], others[1])
    assert np.abs(carried[1]["norm"]["mean"]).min() > 0.1


def assert_updated(stats, x):
    """Compares averages after one update, from the initial 0 and 1, with all inputs in float64."""
    x = x.astype(np.float64)
    for name, old, own in (("mean", 0, x.mean(0)), ("var", 1, x.var(0))):
        once = MOMENTUM * old + (1 - MOMENTUM) * own
        np.testing.assert_allclose(stats[name], once, rtol=1e-5, atol=1e-6)


class Twice(nn.Module):
    """A norm, and one that is called on two inputs."""

    @nn.compact
    def __call__(self, x, train):
        norm = partial(nn.remat(nn.BatchNorm), not train, momentum=MOMENTUM, epsilon=EPSILON)
        x, second = norm(name="first")(x.reshape(len(x), -1)), norm(name="second")
        return nn.Dense(3)(second(x**2) + second(3 * x))


def test_every_norm_is_updated_once_with_its_inputs_in_all_calls_and_micro_batches():
    batch = batch_of()
    _, stats, _ = step_of(Twice())(*start(Twice()), batch)
    parts = [part(batch, i)["image"].reshape(8, -1).astype(np.float64) for i in range(MICRO)]
    normal = [(x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON) for x in parts]
    given = {"first": parts, "second": [np.concatenate([y**2, 3 * y]) for y in normal]}
    for norm, inputs in given.items():
        assert_updated(stats[norm], np.concatenate(inputs))


@functools.cache
def trained(wrapper):
    """State and statistics after three steps, and the metrics of each."""

    def make(axis_name):
        options = {"tx": SMALLER, "axis_name": axis_name, "skip_nonfinite": True}
        model = Tiny(partial(norms.BatchNorm, momentum=0.75, axis_name=axis_name))
        step = partial(accumulated_step, micro_batches=MICRO, model=model, **options)

        def carry(carried, batch):
            *carried, metrics = step(*carried, batch)
            return (tuple(carried), metrics), {}

        return carry

    compiled, carried, history = wrap(wrapper, make), start(Tiny(), SMALLER), []
    for step in range(3):
        # The last shards hold padding only.
        batch = batch_of(step, np.arange(24) < 17)
        (carried, metrics), _ = compiled(carried, batch)
        history.append(metrics)
    (state, stats) = carried
    return state.params, state.opt_state, stats, history


OTHERS = {*WRAPPERS} - {"jit with shardings", "shard_map"}


@pytest.mark.parametrize("wrapper", ["jit with shardings", "shard_map", *map(SLOW, sorted(OTHERS))])
def test_devices_make_the_same_micro_batches_as_one(wrapper):
    close(trained(wrapper), trained("one device"))


def test_statistics_of_replicas_stay_apart():
    def make(axis_name):
        step = partial(accumulated_step, micro_batches=MICRO, model=Tiny(), tx=SGD)

        def carry(carried, batch):
            _, stats, _ = step(*carried, batch, axis_name=axis_name)
            return {}, jax.tree.map(lambda leaf: leaf[None], stats["norm"])

        return carry

    batch = batch_of()
    _, found = wrap("shard_map", make)(start(Tiny()), batch)
    assert_updated(found, batch["image"].reshape(DEVICES, MICRO, -1).swapaxes(0, 1))


class Dropped(nn.Module):
    """Stores which units it dropped, and how often it was called."""

    @nn.compact
    def __call__(self, x, train):
        kept = nn.Dropout(0.5, deterministic=not train)(jnp.ones((1, 64)))
        self.variable("batch_stats", "kept", jnp.zeros, (1, 64)).value = kept
        calls = self.variable("batch_stats", "calls", jnp.zeros, (), jnp.int32)
        calls.value = calls.value + train
        return nn.Dense(3)(x.reshape(x.shape[0], -1)) + kept.mean()


def test_micro_batches_drop_units_of_their_own_and_count_as_one():
    _, stats, _ = step_of(Dropped())(*start(Dropped()), batch_of())
    thrice = stats["kept"] * MICRO / 2  # a unit that is kept is 2
    assert set(np.unique(np.asarray(thrice).round(4))) == {0, 1, 2, 3}
    assert int(stats["calls"]) == 1


def test_one_bad_micro_batch_drops_the_step():
    state, stats = start(Tiny())
    batch = batch_of()
    batch["image"][13] = np.inf
    new, new_stats, metrics = step_of(Tiny(), skip_nonfinite=True)(state, stats, batch)
    assert (int(new.step), int(metrics.skipped)) == (1, 1)
    same = (state.params, state.opt_state, stats), (new.params, new.opt_state, new_stats)
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_frozen_statistics_stay():
    model = freeze_statistics(Tiny(), "norm")
    state, stats = start(model)
    _, after, _ = step_of(model)(state, stats, batch_of())
    jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_an_activation_is_kept_for_one_micro_batch_only():
    args = *start(Tiny(), shape=(8, 8, 1)), batch_of(shape=(8, 8, 1), examples=3072)
    needed = []
    for micro_batches in (1, 6):
        step = step_of(Tiny(), micro_batches=micro_batches)
        memory = step.lower(*args).compile().memory_analysis()
        needed.append(memory.temp_size_in_bytes)
    assert needed[1] < needed[0] / 2


@pytest.mark.slow
def test_examples_stay_on_their_devices_under_jit():
    args = *start(Tiny()), batch_of()
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    whole, parts = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    step = partial(accumulated_step, micro_batches=MICRO, model=Tiny(), tx=SGD)
    compiled = jax.jit(step, in_shardings=(whole, whole, parts), out_shardings=whole)
    program = compiled.lower(*args).compile().as_text()
    assert "all-reduce" in program
    assert not re.search("all-gather|all-to-all|collective-permute", program)


def test_micro_batches_have_to_divide_the_batch():
    with pytest.raises(ValueError, match="cannot be split into 7 equal micro-batches"):
        step_of(Tiny(), micro_batches=7)(*start(Tiny()), batch_of())
