"""The audit: every illness is found in a network that has it, and none in healthy ones."""

import functools
import inspect
import json
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from patients import HEALTHY, ILL, Plain, images, plain, ready, shared_jit, untold

from bnjax import clinic
from bnjax.clinic import Network, Run, audit
from bnjax.clinic.checks import ILLNESSES, depends, match, z_scores
from bnjax.clinic.measure import measure
from bnjax.norms import BatchNorm
from bnjax.train_step import forward, init_variables
from bnjax.types import fingerprint

QUICK = ("scan", "vmap", "shared", "plain")
LONG = ("far from 0 in bfloat16", "far from 0, 60 steps")


def examined(patient):
    network = Network(patient.params, patient.batch_stats, patient.model)
    return audit(network, patient.batches, patient.run, jit=shared_jit)


def some(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", some(HEALTHY, {*HEALTHY} - {*QUICK}))
def test_nothing_is_found_in_a_healthy_network(name):
    findings = examined(HEALTHY[name](seed=0))
    assert findings.ids == (), str(findings)
    # Everything was known; a layer that is called twice cannot be judged by its averages.
    assert [entry.id for entry in findings.not_checked] == (["stale by fit"] * (name == "shared"))
    assert findings.evaluation["stored"]["moved"] < 0.1


@pytest.mark.parametrize("name", some(ILL, LONG))
def test_exactly_the_illness_is_found(name):
    wanted, make = ILL[name]
    findings = examined(make(0))
    assert findings.ids == (wanted,), str(findings)


def test_every_illness_has_a_network():
    assert {wanted for wanted, _ in ILL.values()} == {*ILLNESSES}


def test_nothing_known_is_nothing_found_and_said():
    """Stored statistics alone: what needs more is listed with what is missing."""
    findings = examined(untold(plain(0)).but(batches=[{"image": plain(0).batches[0]["image"]}]))
    assert findings.ids == ()
    missing = {entry.id: entry.missing for entry in findings.not_checked}
    assert {*missing} == {
        "small-batch",
        "weight-decay",
        "batch-dependent in your evaluation",
        "stale by fingerprint",
        "stale by fit",
        "loss and accuracy",
    }
    assert "Run(tx=…)" in missing["weight-decay"]
    assert "second batch" in missing["stale by fit"]


@pytest.mark.parametrize("first", [False, True])
def test_the_rest_of_a_set_says_nothing_of_how_batches_differ(first):
    """A last batch of one image, of a set that is cut up: its mean is the image."""
    patient = plain(0)
    whole = examined(patient)
    rest = {name: leaf[:1] for name, leaf in patient.batches[0].items()}
    batches = [rest, *patient.batches] if first else [*patient.batches, rest]
    findings = examined(patient.but(batches=batches))
    assert findings.ids == (), str(findings)
    assert findings.layers == whole.layers
    assert findings.examples == whole.examples + 1  # it is predicted, all the same
    two = examined(patient.but(batches=[patient.batches[0], rest]))
    assert "a second batch" in {one.id: one.missing for one in two.not_checked}["small-batch"]


def test_weights_that_are_not_numbers_are_not_called_dead_channels():
    patient = plain(0)
    params = jax.tree.map(np.array, patient.params)
    params["Dense_0"]["kernel"][0, 0] = np.nan
    findings = examined(patient.but(params=params).knowing(weights=fingerprint(params)))
    assert "invalid-statistics" in findings.ids
    assert "dead-channels" not in findings.ids
    (one,) = (one for one in findings.found if one.id == "invalid-statistics")
    assert one.layers == ("first", "second")
    assert "1 with inputs that are not finite" in one.measured


def test_what_is_measured_is_what_numpy_measures():
    patient = plain(0)
    findings = examined(patient)
    # What the first norm is given: the images through a dense layer, in float64.
    kernel, bias = (
        np.asarray(patient.params["Dense_0"][name], float) for name in ("kernel", "bias")
    )
    given = [(batch["image"].reshape(64, -1) / 255.0) @ kernel + bias for batch in patient.batches]
    mean, var = (
        np.stack([function(one, axis=0) for one in given]) for function in (np.mean, np.var)
    )
    std, stored = np.sqrt(var.mean(0) + 1e-5), patient.batch_stats["first"]
    drift = (stored["mean"] - mean.mean(0)) / std
    row = findings.layers[0]
    assert row.name == "first"
    assert row.count == 64
    np.testing.assert_allclose(row.drift, np.sqrt(np.mean(drift**2)), rtol=1e-3)
    ratio = np.log((stored["var"] + 1e-5) / std**2)
    np.testing.assert_allclose(row.log_ratio, ratio.mean(), atol=1e-5)
    noise = np.sqrt(np.mean((mean.std(0, ddof=1) / std) ** 2))
    np.testing.assert_allclose(row.noise, noise, rtol=1e-3)


def test_loss_and_accuracy_under_three_statistics():
    findings = examined(ILL["never updated"][1](0))
    stored, precise, batch = (findings.evaluation[name] for name in ("stored", "precise", "batch"))
    right = examined(plain(0)).evaluation
    assert precise["accuracy"] == right["precise"]["accuracy"] > 0.95
    assert batch["accuracy"] > 0.95
    assert stored["loss"] > 2 * precise["loss"]


def test_the_ratio_of_variances_is_that_of_dropout():
    """Inputs kept with probability 1/2 and doubled: E[x^2] doubles, the mean stays."""
    patient = ready(dropout=0.5)(0)
    findings = examined(patient)
    (found,) = findings.found
    assert found.layers == ("second",)
    first, second = findings.layers
    assert first.shift is None
    # Independent units: the variance of a sum grows by the sum of w^2 E[x^2], so it can but rise.
    assert second.shift > np.log(1.1)


def test_how_long_it_takes_to_converge():
    (found,) = examined(ready(momentum=0.99)(0)).found
    assert f"{0.99**60:.1%}" in found.measured
    assert "459 updates" in found.measured


def test_layers_are_named():
    for name, layers in (
        ("NaN", ("first", "second")),
        ("far from 0, one-pass variance", ("first",)),
    ):
        (found,) = examined(ILL[name][1](0)).found
        assert found.layers == layers


def test_replicas_that_agree_are_one():
    patient = plain(0)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), patient.batch_stats)
    params = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), patient.params)
    assert examined(patient.but(batch_stats=stacked, params=params)).ids == ()


def test_copies_on_devices_that_differ():
    patient, devices = plain(0), jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("d",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def spread(apart):
        def one(leaf):
            parts = [jax.device_put(leaf + apart * i, device) for i, device in enumerate(devices)]
            return jax.make_array_from_single_device_arrays(leaf.shape, everywhere, parts)

        return jax.tree.map(one, patient.batch_stats)

    for apart, wanted in ((0.0, []), (0.1, ["replicas-differ"])):
        network = Network(patient.params, spread(apart), patient.model)
        _, found, _ = match(network, patient.batches[0])
        assert [one.id for one in found] == wanted


@pytest.mark.parametrize(
    ("tx", "zero", "one"),
    [
        (optax.sgd(0.1, momentum=0.9), (), ()),
        (optax.adam(0.1), (), ()),
        (optax.adamw(0.1), ("bias", "kernel"), ("bias", "kernel")),
        (optax.adamw(0.1, mask={"bias": False, "kernel": True}), ("kernel",), ("kernel",)),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), (), ()),
        (optax.MultiSteps(optax.adamw(0.1), 4), ("bias", "kernel"), ("bias", "kernel")),
        (optax.adamw(optax.linear_schedule(0.0, 0.1, 9)), ("bias", "kernel"), ("bias", "kernel")),
        (optax.lars(0.1, weight_decay_mask=False), (), ("bias", "kernel")),
    ],
)
def test_what_an_optimizer_does_is_found_by_trying_it(tx, zero, one):
    params = {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}
    for gradient, wanted in ((0.0, zero), (1.0, one)):
        assert depends(tx, params, gradient=gradient) == {(name,) for name in wanted}


def test_an_optimizer_that_wants_more_is_not_checked():
    def update(grads, state, params):
        raise KeyError("the loss")

    tx = optax.GradientTransformation(optax.sgd(0.1).init, update)
    findings = examined(plain(0).knowing(tx=tx))
    assert [entry.id for entry in findings.not_checked] == ["weight-decay"]


@pytest.mark.slow
def test_padding_counts_for_nothing():
    patient = HEALTHY["convnet"](seed=0)
    rng = np.random.default_rng(0)
    padded = [
        {
            "image": np.concatenate([batch["image"], rng.integers(0, 255, (8, 8, 8, 3), np.uint8)]),
            "label": np.concatenate([batch["label"], np.zeros(8, np.int32)]),
            "mask": np.arange(72) < 64,
        }
        for batch in patient.batches
    ]
    with_padding, without = examined(patient.but(batches=padded)), examined(patient)
    assert with_padding.examples == without.examples == 384
    for one, other in zip(with_padding.layers, without.layers, strict=True):
        np.testing.assert_allclose(one.drift, other.drift, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(one.noise, other.noise, rtol=1e-3)
        assert one.count == other.count
    with pytest.raises(ValueError, match="takes no `mask`"):
        examined(plain(0).but(batches=padded))


def test_a_batch_of_nothing_is_refused():
    patient = plain(0)
    with pytest.raises(ValueError, match="nothing to audit with"):
        audit(Network(patient.params, patient.batch_stats, patient.model), [])


def test_the_result_as_text_and_as_json():
    findings = examined(ILL["NaN"][1](0))
    content = json.loads(json.dumps(findings.as_json(), allow_nan=False))
    assert content["healthy"] is False
    assert content["findings"][0]["id"] == "invalid-statistics"
    assert content["layers"][0]["found"] == ["invalid-statistics"]
    assert "to mend it: skip steps that are not finite" in str(findings)
    assert max(map(len, str(findings).splitlines())) <= 120
    assert "healthy: nothing was found" in str(examined(plain(0)))


def test_a_fingerprint_is_of_every_bit_name_and_shape():
    params = {"a": {"kernel": np.arange(6, dtype=np.float32)}, "b": np.float32(1)}
    seen = {
        fingerprint(params),
        fingerprint({"a": {"bias": params["a"]["kernel"]}, "b": params["b"]}),
    }
    seen.add(fingerprint({"a": {"kernel": params["a"]["kernel"].reshape(2, 3)}, "b": params["b"]}))
    changed = params["a"]["kernel"].copy()
    changed[5] = np.nextafter(changed[5], np.float32(9))
    seen.add(fingerprint({"a": {"kernel": changed}, "b": params["b"]}))
    assert len(seen) == 4
    assert fingerprint(jax.tree.map(jnp.asarray, params)) == fingerprint(params)


@pytest.mark.parametrize("size", [16, 128])
def test_stored_statistics_stray_as_far_as_their_standard_error_says(size):
    """At weights that stand still, averages over independent batches have z-scores of RMS 1."""
    # 0.8 ** 60 is nothing: the starting values do not count.
    model, rng, repeats = Plain(momentum=0.8), np.random.default_rng(0), 16
    params, initial = init_variables(model, jax.random.key(0), images(0)[0][:2])
    update = jax.jit(functools.partial(forward, model=model, train=True))
    scores = []
    for _ in range(repeats):
        fresh = [{"image": images(rng.integers(1 << 32), size)[0]} for _ in range(92)]
        stats = initial
        for batch in fresh[:60]:
            stats = update(params, stats, batch)[1]["batch_stats"]
        network, run = Network(params, stats, model), Run(batch_size=size)
        case = measure(network, fresh[60:], run, shared_jit)
        scores.append([z_scores(case, layer) for layer in case.layers])
    # Squares of 16 repeats in at least four directions have a mean of 1 +- 0.18.
    squares = np.square(scores).mean(0)
    assert squares.min() > 0.5
    assert squares.max() < 1.6


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
    model, (image, _) = Synced(norm), images(0, 64)
    params, stats = init_variables(model, jax.random.key(0), image[:2])
    network, batches = clinic.linen(model, params, stats), [{"image": image[:32]}, {"image": image}]
    assert "never-updated" in clinic.audit(network, batches).ids
    mended = clinic.precise(network, [{"image": image}])
    convolved = nn.Conv(4, (3, 3)).apply({"params": params["conv"]}, np.float32(image) / 255)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(mended.batch_stats["norm"]["mean"], np.float64(convolved).mean((0, 1, 2)))
    close(mended.batch_stats["norm"]["var"], np.float64(convolved).var((0, 1, 2)))
    folded = clinic.fold(mended, image[:1])
    logits = [
        forward(one.params, one.batch_stats, {"image": image}, model=one.model, train=False)[0]
        for one in (mended, folded)
    ]
    assert not folded.batch_stats
    close(logits[0], logits[1])


def flagged(flag, training):
    """A network with this flag, which is so in training."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, **flags):
            train = flags[flag] == training
            return nn.Dense(2)(nn.BatchNorm(use_running_average=not train)(x).mean((1, 2)))

    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for name in ("self", "x", flag)
    ]
    Net.__call__.__signature__ = inspect.Signature(parameters)
    return Net()


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("flag", "training"),
    [("training", True), ("is_training", True), ("deterministic", False), ("phase", "train")],
)
def test_flags_of_other_names(flag, training, given):
    model, image = flagged(flag, training), np.float32(images(0, 32)[0])
    variables = model.init(jax.random.key(0), image[:2], **{flag: "test" if flag == "phase" else 0})
    if not given and flag == "phase":
        with pytest.raises(ValueError, match="none of the arguments train"):
            clinic.linen(model, **variables)
        return

    def call(module, x, train):
        return module(x, **{flag: training if train else (not training)})

    network = clinic.linen(model, **variables, call=call if given else None)
    mended = clinic.precise(network, [{"image": image}])
    (mean,) = (leaf["mean"] for leaf in mended.batch_stats.values())
    np.testing.assert_allclose(mean, image.mean((0, 1, 2)), rtol=1e-5)
    assert "never-updated" in clinic.audit(network, [{"image": image}, {"image": image}]).ids


def test_exchanged_statistics_are_stale_and_not_unfinished():
    """The layers disagree about the share of the starting values that would explain them."""
    patient = HEALTHY["plain"](seed=0).knowing(steps=None, weights=None)
    names = sorted(patient.batch_stats)
    sizes = {name: patient.batch_stats[name]["mean"].shape for name in names}
    one, other = next((a, b) for a in names for b in names if a < b and sizes[a] == sizes[b])
    stats = patient.batch_stats
    swapped = stats | {one: stats[other], other: stats[one]}
    findings = examined(patient.but(batch_stats=swapped))
    assert findings.ids == ("stale",), str(findings)
    assert {one, other} <= {name for found in findings.found for name in found.layers}
