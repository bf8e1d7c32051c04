"""The audit: every illness is found in a network that has it, and none in healthy ones."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from patients import HEALTHY, ILL, Plain, given_to_first, images, plain, untold
from zoo.kit import audit, shared_jit

from bnjax.clinic import Run, linen
from bnjax.clinic.checks import ILLNESSES, depends, match
from bnjax.clinic.measure import measure
from bnjax.train_step import forward, init_variables
from bnjax.types import fingerprint

QUICK = ("remat", "plain", "plain, our norm, far from 0", "plain, frozen and stepped")
QUICK += ("dropout before a norm, recomputed",)
LONG = ("far from 0 in bfloat16", "far from 0, 60 steps", "momentum 0.99, untold")

# The zoo has the same faults.
IN_ZOO = ("averaged weights", "averages in bfloat16", "batches of 4", "epsilon of 10")
IN_ZOO += ("evaluated by the batch", "flag without effect", "AdamW on all", "LARS on all")


def examined(patient):
    return audit(patient.network, patient.batches, patient.run)


@functools.cache
def findings_of(name):
    """Of the patient of that name, once for all tests."""
    return examined(HEALTHY[name](0) if name in HEALTHY else ILL[name][1](0))


def some(names, slow):
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]


@pytest.mark.parametrize("name", some(HEALTHY, {*HEALTHY} - {*QUICK}))
def test_nothing_is_found_in_a_healthy_network(name):
    findings = findings_of(name)
    assert findings.ids == (), str(findings)
    assert findings.not_checked == ()  # everything was known
    assert findings.evaluation["stored"]["moved"] < 0.1


BOTH = ("first", "second")
# The layers and the text of each finding.
EVIDENCE = {
    "NaN": (BOTH, "1 with non-finite statistics"),
    "far from 0, one-pass variance": (("first",), "E[x^2] - E[x]^2 in float32"),
    "dropout before a norm": (("second",), "variance in evaluation = 1."),
    "momentum 0.99": (BOTH, f"{0.99**60:.1%}", "1% takes 459 updates"),
    "one norm, called twice": (("Layer_0.BatchNorm_0",), "2 calls per pass"),
    "two passes in a step": (BOTH, "2 updates per step"),
    "frozen in name": (("first",), "mean, var changed"),
}


@pytest.mark.parametrize("name", some(ILL, LONG + IN_ZOO))
def test_exactly_the_illness_is_found(name):
    findings = findings_of(name)
    assert findings.ids == (ILL[name][0],), str(findings)
    if name in EVIDENCE:
        layers, *words = EVIDENCE[name]
        (found,) = findings.found
        assert found.layers == layers
        assert all(word in found.measured for word in words)


def test_every_illness_has_a_network():
    assert {wanted for wanted, _ in ILL.values()} == {*ILLNESSES}


def test_nothing_known_is_nothing_found_and_said():
    """Stored statistics alone: what needs more is listed with what is missing."""
    findings = examined(untold(plain(0)).having(batches=[{"image": plain(0).batches[0]["image"]}]))
    assert findings.ids == ()
    missing = {entry.id: entry.missing for entry in findings.not_checked}
    wanted = {"small-batch", "weight-decay", "batch-dependent in your evaluation"}
    assert {*missing} == wanted | {"stale by fingerprint", "stale by fit", "loss and accuracy"}
    assert "Run(tx=…)" in missing["weight-decay"]
    assert "second batch" in missing["stale by fit"]


def test_the_rest_of_a_set_says_nothing_of_how_batches_differ():
    """A last batch of one image, of a set that is cut up: its mean is the image."""
    patient = plain(0)
    whole = findings_of("plain")
    rest = {name: leaf[:1] for name, leaf in patient.batches[0].items()}
    findings = examined(patient.having(batches=[rest, *patient.batches]))
    assert findings.ids == (), str(findings)
    assert findings.layers == whole.layers
    assert findings.examples == whole.examples + 1  # it is predicted, all the same


def test_weights_that_are_not_numbers_are_not_called_dead_channels():
    patient = plain(0)
    params = jax.tree.map(np.array, patient.network.params)
    params["Dense_0"]["kernel"][0, 0] = np.nan
    findings = examined(patient.but(params=params).knowing(weights=fingerprint(params)))
    found = {one.id: one for one in findings.found}
    assert "dead-channels" not in found
    assert found["invalid-statistics"].layers == BOTH
    assert "1 with non-finite inputs" in found["invalid-statistics"].measured


def test_what_is_measured_is_what_numpy_measures():
    patient, row = plain(0), findings_of("plain").layers[0]
    given = np.stack([given_to_first(patient.network, batch) for batch in patient.batches])
    mean, var, stored = given.mean(1), given.var(1), patient.network.batch_stats["first"]
    std = np.sqrt(var.mean(0) + 1e-5)
    drift = (stored["mean"] - mean.mean(0)) / std
    assert (row.name, row.count) == ("first", 64)
    np.testing.assert_allclose(row.drift, np.sqrt(np.mean(drift**2)), rtol=1e-3)
    ratio = np.log((stored["var"] + 1e-5) / std**2)
    np.testing.assert_allclose(row.log_ratio, ratio.mean(), atol=1e-5)
    noise = np.sqrt(np.mean((mean.std(0, ddof=1) / std) ** 2))
    np.testing.assert_allclose(row.noise, noise, rtol=1e-3)


def test_loss_and_accuracy_under_three_statistics():
    found = findings_of("never updated").evaluation
    stored, precise, batch = (found[name] for name in ("stored", "precise", "batch"))
    right = findings_of("plain").evaluation
    assert precise["accuracy"] == right["precise"]["accuracy"] > 0.95
    assert batch["accuracy"] > 0.95
    assert stored["loss"] > 2 * precise["loss"]


def test_replicas_that_agree_are_one():
    patient = plain(0)
    trees = patient.network.params, patient.network.batch_stats
    params, stats = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), trees)
    assert examined(patient.but(batch_stats=stats, params=params)).ids == ()


def test_copies_on_devices_that_differ():
    patient, devices = plain(0), jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("d",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def spread(apart):
        def one(leaf):
            parts = [jax.device_put(leaf + apart * i, device) for i, device in enumerate(devices)]
            return jax.make_array_from_single_device_arrays(leaf.shape, everywhere, parts)

        return jax.tree.map(one, patient.network.batch_stats)

    for apart, wanted in ((0.0, []), (0.1, ["replicas-differ"])):
        network = patient.network.replace(batch_stats=spread(apart))
        _, found, _ = match(network, patient.batches[0])
        assert [one.id for one in found] == wanted


@pytest.mark.parametrize(
    ("tx", "zero", "one"),
    [
        (optax.sgd(0.1, momentum=0.9), (), ()),
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
    patient, without = HEALTHY["convnet"](seed=0), findings_of("convnet")
    mask = {"mask": np.arange(72) < 64}
    padded = [
        {name: np.concatenate([of, of[:8]]) for name, of in batch.items()} | mask
        for batch in patient.batches
    ]
    with_padding = examined(patient.having(batches=padded))
    assert with_padding.examples == without.examples == 384
    for one, other in zip(with_padding.layers, without.layers, strict=True):
        np.testing.assert_allclose(one.drift, other.drift, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(one.noise, other.noise, rtol=1e-3)
        assert one.count == other.count


def test_batches_that_cannot_be_used_are_refused():
    masked = [batch | {"mask": np.arange(64) < 60} for batch in plain(0).batches]
    for batches, words in (([], "at least two examples"), (masked, "takes no `mask`")):
        with pytest.raises(ValueError, match=words):
            examined(plain(0).having(batches=batches))


def test_the_result_as_text_and_to_dict():
    findings = findings_of("NaN")
    content = json.loads(json.dumps(findings.to_dict(), allow_nan=False))
    assert content["healthy"] is False
    assert content["findings"][0]["id"] == "invalid-statistics"
    assert content["layers"][0]["found"] == ["invalid-statistics"]
    assert "to fix it: skip non-finite steps" in str(findings)
    assert max(map(len, str(findings).splitlines())) <= 120
    assert "healthy: nothing found" in str(findings_of("plain"))


def test_the_table_for_a_notebook_has_colours_links_and_no_markup_of_the_user():
    findings = findings_of("scales of 0")
    page = findings._repr_html_()
    (row,) = (row for row in page.split("<tr>") if ">second" in row)
    # 4 of 16 channels are dead, more than twice the limit of 10 %: red; in the first none: green.
    assert 'hsla(0, 80%, 45%, 0.35); font-weight: bold">4' in row
    assert 'hsla(120, 80%, 45%, 0.35); font-weight: normal">0' in page
    assert 'href="docs/findings/dead-channels.md">dead-channels</a>' in row
    assert "to fix it: lower the learning rate" in page
    marked = dataclasses.replace(findings.layers[0], name="<script>", drift=np.nan)
    page = dataclasses.replace(findings, layers=(marked,))._repr_html_()
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert 'bold">nan' in page


def test_a_fingerprint_is_of_every_bit_name_and_shape():
    kernel = np.arange(6, dtype=np.float32)
    other = kernel.copy()
    other[5] = np.nextafter(other[5], np.float32(9))
    trees = [{"kernel": kernel}, {"bias": kernel}, {"kernel": other}, {"kernel": kernel[:, None]}]
    assert len({fingerprint(tree) for tree in trees}) == 4
    assert fingerprint({"kernel": jnp.asarray(kernel)}) == fingerprint(trees[0])


@pytest.mark.slow
def test_stored_statistics_stray_as_far_as_their_standard_error_says():
    """At weights that stand still, averages over independent batches have z-scores of RMS 1."""
    # 0.8 ** 60 is nothing: the starting values do not count.
    model, rng, repeats, size = Plain(momentum=0.8), np.random.default_rng(0), 16, 16
    params, initial = init_variables(model, jax.random.key(0), images(0)["image"][:2])
    update = jax.jit(functools.partial(forward, model=model, train=True))
    scores = []
    for _ in range(repeats):
        fresh = [{"image": images(rng.integers(1 << 32), size)["image"]} for _ in range(92)]
        stats = initial
        for batch in fresh[:60]:
            stats = update(params, stats, batch)[1]["batch_stats"]
        network, run = linen(model, params, stats), Run(batch_size=size)
        case = measure(network, fresh[60:], run, shared_jit)
        scores.append([layer.z_scores for layer in case.layers])
    # Squares of 16 repeats in at least four directions have a mean of 1 +- 0.18.
    squares = np.square(scores).mean(0)
    assert squares.min() > 0.5
    assert squares.max() < 1.6


@pytest.mark.parametrize(
    ("factor", "units", "run"),
    [(1.0, "0 to 255", Run(steps=150)), (1 / 255**2, "0 to 1", Run())],
)
def test_images_in_other_units_are_named_as_the_cause(factor, units, run):
    """The network was trained on uint8 images, which are divided by 255; floats are not."""
    patient = plain(0)
    scaled = [(one["image"] * factor).astype(np.float32) for one in patient.batches]
    batches = [{"image": image} for image in scaled]
    findings = audit(patient.network, batches, run).found
    found = next(one for one in findings if one.id == "stale")
    assert f"these images have pixels from {units}, and" in found.measured


def test_images_of_a_wrong_shape_are_named_with_the_leaves():
    patient = plain(0)
    batches = [one | {"image": one["image"][:, :4]} for one in patient.batches]
    (found,) = audit(patient.network, batches).found
    assert found.id == "unmatched-leaves"
    assert f"for images {[*batches[0]['image'].shape[1:]]}" in found.measured
    (found,) = findings_of("a leaf too few").found
    assert "for images" not in found.measured


def test_exchanged_statistics_are_stale_and_not_unfinished():
    """The layers disagree about the share of the starting values that would explain them."""
    patient = plain(0).knowing(steps=None, weights=None)
    stats = patient.network.batch_stats
    swapped = {"first": stats["second"], "second": stats["first"]}
    (found,) = examined(patient.but(batch_stats=swapped)).found
    assert (found.id, found.layers) == ("stale", ("first", "second"))
