"""The steps against NumPy in float64, and against the traps that the contract exists for."""

import functools
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bnjax.train_step import eval_step, init_state, predict_step, softmax_cross_entropy, train_step

pytestmark = pytest.mark.lane

MOMENTUM, EPSILON, RATE = 0.75, 1e-3, 0.1


class Tiny(nn.Module):
    """Flatten, BN without scale and shift, one dense layer: small enough to do by hand."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        x = x.reshape(x.shape[0], -1)
        full = None if mask is None else mask[:, None]
        norm = nn.BatchNorm(
            momentum=MOMENTUM, epsilon=EPSILON, use_scale=False, use_bias=False, name="norm"
        )
        return nn.Dense(3, name="dense")(norm(x, use_running_average=not train, mask=full))


class Plain(nn.Module):
    """A stranger's model: no mask, no statistics."""

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def make_batch(n=8, seed=0, mask=None):
    rng = np.random.default_rng(seed)
    batch = {
        "image": rng.integers(0, 256, (n, 2, 2, 1), np.uint8),
        "label": rng.integers(0, 3, n).astype(np.int32),
    }
    return batch if mask is None else batch | {"mask": np.asarray(mask)}


def start(model, tx=None):
    return init_state(model, tx or optax.sgd(RATE), jax.random.key(0), make_batch()["image"])


def by_hand(kernel, bias, mean, var, batch):
    """One step of gradient descent on Tiny in float64; padding left out altogether."""
    real = batch.get("mask", np.ones(len(batch["label"]), bool))
    x = batch["image"][real].reshape(real.sum(), -1).astype(np.float64) / 255
    label = batch["label"][real]
    batch_mean, batch_var = x.mean(0), x.var(0)
    normal = (x - batch_mean) / np.sqrt(batch_var + EPSILON)
    logits = normal @ kernel + bias
    score = np.exp(logits - logits.max(1, keepdims=True))
    score /= score.sum(1, keepdims=True)
    losses = -np.log(score[np.arange(len(label)), label])
    slope = (score - np.eye(3)[label]) / len(label)
    return {
        "kernel": kernel - RATE * normal.T @ slope,
        "bias": bias - RATE * slope.sum(0),
        "mean": MOMENTUM * mean + (1 - MOMENTUM) * batch_mean,
        "var": MOMENTUM * var + (1 - MOMENTUM) * batch_var,
        "loss": losses.sum(),
        "correct": (logits.argmax(1) == label).sum(),
        "count": len(label),
    }


@pytest.mark.parametrize("mask", [None, [True] * 5 + [False] * 3])
def test_one_step_equals_float64_by_hand(mask):
    model, tx, batch = Tiny(), optax.sgd(RATE), make_batch(mask=mask)
    state, stats = start(model)
    wanted = by_hand(
        *(np.asarray(state.params["dense"][k], np.float64) for k in ("kernel", "bias")),
        *(np.asarray(stats["norm"][k], np.float64) for k in ("mean", "var")),
        batch,
    )
    state, stats, metrics = jax.jit(functools.partial(train_step, model=model, tx=tx))(
        state, stats, batch
    )
    for name in ("kernel", "bias"):
        np.testing.assert_allclose(state.params["dense"][name], wanted[name], rtol=1e-5, atol=1e-6)
    for name in ("mean", "var"):
        np.testing.assert_allclose(stats["norm"][name], wanted[name], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics.loss, wanted["loss"], rtol=1e-5)
    assert (int(metrics.correct), int(metrics.count)) == (wanted["correct"], wanted["count"])
    assert int(state.step) == 1


def test_whatever_stands_in_padding_changes_nothing():
    mask = np.array([True] * 5 + [False] * 3)
    clean, dirty = (
        make_batch(mask=mask) | {"image": make_batch()["image"].astype(np.float32)}
        for _ in range(2)
    )
    dirty["image"] = dirty["image"].copy()
    dirty["image"][5:] = np.nan
    dirty["label"] = dirty["label"].copy()
    dirty["label"][5:] = 2
    step = functools.partial(train_step, model=Tiny(), tx=optax.sgd(RATE))
    (ours, *rest), (its, *others) = step(*start(Tiny()), clean), step(*start(Tiny()), dirty)
    jax.tree.map(np.testing.assert_array_equal, [ours.params, *rest], [its.params, *others])


def test_a_batch_of_nothing_but_padding_leaves_the_parameters_alone():
    state, stats = start(Plain())
    after, _, metrics = train_step(
        state, stats, make_batch(mask=[False] * 8), model=Plain(), tx=optax.sgd(RATE)
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, after.params)
    assert int(metrics.count) == 0
    with pytest.raises(ValueError, match="no mean without examples"):
        metrics.means()


def test_evaluation_depends_on_the_image_alone():
    state, stats = start(Tiny())
    batch = make_batch()
    together = predict_step(state.params, stats, batch["image"], model=Tiny())["score"]
    alone = [
        predict_step(state.params, stats, batch["image"][i : i + 1], model=Tiny())["score"][0]
        for i in range(8)
    ]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-6)


def test_evaluation_uses_the_running_statistics_it_is_given():
    state, stats = start(Tiny())
    image = make_batch()["image"]
    mean, var = np.arange(4.0), np.arange(1.0, 5.0)
    stats = {"norm": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}}
    normal = (image.reshape(8, -1) / 255 - mean) / np.sqrt(var + EPSILON)
    logits = normal @ np.asarray(state.params["dense"]["kernel"], np.float64)
    score = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = predict_step(state.params, stats, image, model=Tiny())
    np.testing.assert_allclose(predicted["score"], score, rtol=1e-4)
    np.testing.assert_array_equal(predicted["class"], logits.argmax(1))
    assert predicted["class"].dtype == jnp.int32


def test_metrics_of_parts_merge_to_those_of_the_whole():
    state, stats = start(Tiny())
    batch = make_batch(8)
    parts = [{k: v[i : i + size] for k, v in batch.items()} for i, size in ((0, 3), (3, 5))]
    first, second = (eval_step(state.params, stats, part, model=Tiny()) for part in parts)
    whole = eval_step(state.params, stats, batch, model=Tiny()).means()
    assert first.merge(second).means() == pytest.approx(whole, rel=1e-6)


def test_floats_pass_unchanged_and_uint8_is_divided_by_255():
    state, stats = start(Plain())
    batch = make_batch()
    as_float = batch | {"image": batch["image"].astype(np.float32) / np.float32(255)}
    ours, its = (eval_step(state.params, stats, b, model=Plain()) for b in (batch, as_float))
    np.testing.assert_allclose(ours.loss, its.loss, rtol=1e-6)


def test_a_model_without_statistics_or_mask_trains():
    state, stats = start(Plain())
    assert stats == {}
    after, stats, _ = train_step(
        state, stats, make_batch(mask=[True] * 7 + [False]), model=Plain(), tx=optax.sgd(RATE)
    )
    assert stats == {}
    assert not np.array_equal(state.params["Dense_0"]["kernel"], after.params["Dense_0"]["kernel"])


def test_other_collections_are_refused_by_name():
    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            self.variable("spectra", "u", jnp.zeros, (3,))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    with pytest.raises(ValueError, match=r"Spectral creates the collections \['spectra'\]"):
        start(Spectral())


def test_the_loss_is_the_callers():
    def squared(logits, label):
        return jnp.square(logits - jax.nn.one_hot(label, 3)).sum(-1)

    state, stats = start(Plain())
    batch = make_batch()
    metrics = eval_step(state.params, stats, batch, model=Plain(), loss_fn=squared)
    logits = (
        batch["image"].reshape(8, -1)
        / 255
        @ np.asarray(state.params["Dense_0"]["kernel"], np.float64)
    )
    np.testing.assert_allclose(
        metrics.loss, np.square(logits - np.eye(3)[batch["label"]]).sum(), rtol=1e-5
    )


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(64)(x.reshape(x.shape[0], -1)))


def test_dropout_differs_from_step_to_step_and_repeats_with_the_state():
    state, stats = start(Dropping(), optax.sgd(0.0))
    step = functools.partial(train_step, model=Dropping(), tx=optax.sgd(0.0))
    batch = make_batch()
    second, _, first_loss = step(state, stats, batch)
    _, _, again = step(state, stats, batch)
    _, _, second_loss = step(second, stats, batch)
    assert float(first_loss.loss) == float(again.loss)
    assert float(first_loss.loss) != float(second_loss.loss)
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(second.rng))


def test_scan_over_steps_and_vmap_over_seeds_equal_the_loop():
    model, tx = Tiny(), optax.sgd(RATE)
    step = functools.partial(train_step, model=model, tx=tx)
    batches = [make_batch(seed=seed) for seed in range(3)]
    keys = jax.random.split(jax.random.key(7), 2)

    def solo(key):
        state, stats = init_state(model, tx, key, batches[0]["image"])
        for batch in batches:
            state, stats, _ = step(state, stats, batch)
        return state.params, stats

    def scanned(key):
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        (state, stats), _ = jax.lax.scan(
            lambda carry, batch: ((out := step(*carry, batch))[:2], out[2]),
            init_state(model, tx, key, batches[0]["image"]),
            stacked,
        )
        return state.params, stats

    together = jax.vmap(scanned)(keys)
    for i, key in enumerate(keys):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
            jax.tree.map(lambda x, i=i: x[i], together),
            solo(key),
        )


def test_cross_entropy_of_low_precision_logits_is_float32():
    assert (
        softmax_cross_entropy(jnp.ones((2, 3), jnp.bfloat16), jnp.array([0, 1])).dtype
        == jnp.float32
    )


def test_importing_the_steps_brings_no_heavy_module():
    code = "import sys, bnjax.train_step; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {
        "tensorflow",
        "tensorflow_datasets",
        "orbax",
        "ml_collections",
        "sklearn",
        "tensorboard",
        "tensorboardX",
        "tqdm",
        "PIL",
    }
    assert "bnjax.train_step" in loaded
    assert heavy.isdisjoint(name.partition(".")[0] for name in loaded)


@jax.custom_vjp
def steepen(x, bad):
    """x, with an infinite slope where `bad`."""
    return x


steepen.defvjp(
    lambda x, bad: (x, bad), lambda bad, slope: (slope + jnp.where(bad, jnp.inf, 0.0), None)
)


class Poisoned(nn.Module):
    """Has an infinite gradient, activation or statistic where the first pixel says so (0 to 3)."""

    @nn.compact
    def __call__(self, x, train):
        kind = x[0, 0, 0, 0]
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(3, name="dense")(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = x + jnp.where(kind == 1, jnp.inf, 0.0)  # the loss
        x = steepen(x, kind == 2)  # the gradient
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        if train:
            seen.value = jnp.where(kind == 3, jnp.nan, seen.value + 1)
        return x


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_is_dropped_whole(kind):
    tx = optax.adam(RATE)
    batch = make_batch() | {
        "image": np.zeros((8, 2, 2, 1), np.float32)
        + np.arange(8, dtype=np.float32)[:, None, None, None]
        + kind
    }
    state, stats = init_state(Poisoned(), tx, jax.random.key(0), batch["image"])
    step = jax.jit(functools.partial(train_step, model=Poisoned(), tx=tx, skip_nonfinite=True))
    after, new_stats, metrics = step(state, stats, batch)
    assert int(after.step) == 1
    assert int(metrics.skipped) == (kind != 0)
    same = jax.tree.map(
        np.array_equal,
        (state.params, state.opt_state, stats),
        (after.params, after.opt_state, new_stats),
    )
    if kind:
        assert all(jax.tree.leaves(same))
    else:
        assert not any(jax.tree.leaves(same[2]))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after.params, new_stats)))


def test_without_the_option_nothing_is_dropped():
    batch = make_batch() | {"image": np.full((8, 2, 2, 1), np.nan, np.float32)}
    state, stats = start(Tiny())
    after, _, metrics = train_step(state, stats, batch, model=Tiny(), tx=optax.sgd(RATE))
    assert int(metrics.skipped) == 0
    assert np.isnan(after.params["dense"]["kernel"]).any()


def test_replicas_drop_a_step_together():
    """Only one of two shards meets the bad statistic."""
    tx = optax.sgd(RATE)
    batch = make_batch() | {
        "image": np.zeros((8, 2, 2, 1), np.float32)
        + np.arange(8, dtype=np.float32)[:, None, None, None] * 3
    }
    shards = jax.tree.map(
        lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:])[:, ::-1], batch
    )  # the first pixels: 9 and 21
    shards["image"][1, 0] = 3.0
    state, stats = init_state(Poisoned(), tx, jax.random.key(0), batch["image"])
    step = functools.partial(
        train_step, model=Poisoned(), tx=tx, axis_name="shards", skip_nonfinite=True
    )
    together = jax.jit(jax.vmap(step, axis_name="shards", in_axes=(None, None, 0)))
    after, new_stats, metrics = together(state, stats, shards)
    np.testing.assert_array_equal(metrics.skipped, [1, 1])
    np.testing.assert_array_equal(new_stats["seen"], [0, 0])
    for row in after.params["dense"]["kernel"]:
        np.testing.assert_array_equal(row, state.params["dense"]["kernel"])


def test_smoothing_and_shares_against_the_definition_in_float64():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(6, 4)).astype(np.float32), np.arange(6) % 4
    shares = rng.dirichlet(np.ones(4), 6).astype(np.float32)
    exact = logits.astype(np.float64)
    logs = exact - np.log(np.exp(exact).sum(1, keepdims=True))
    for given, target in ((label, np.eye(4)[label]), (shares, shares)):
        for smoothing in (0.0, 0.2):
            smooth = (1 - smoothing) * target + smoothing / 4
            found = softmax_cross_entropy(logits, given, smoothing=smoothing)
            np.testing.assert_allclose(found, -(smooth * logs).sum(1), rtol=1e-5)


def test_a_batch_of_whole_shares_is_the_batch_of_their_classes():
    batch = make_batch(mask=[True] * 6 + [False] * 2)
    mixed = {**batch, "label": np.eye(3, dtype=np.float32)[batch["label"]]}
    state, stats = start(Tiny())
    step = functools.partial(train_step, state, stats, model=Tiny(), tx=optax.sgd(RATE))
    for found, wanted in zip(*map(jax.tree.leaves, (step(mixed), step(batch))), strict=True):
        if jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
            continue
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
