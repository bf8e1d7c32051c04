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


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (8, 2, 2, 1), np.uint8),
        "label": rng.integers(0, 3, 8).astype(np.int32),
    }


def padded(batch):
    """The batch with three images of padding, and NaN in them."""
    real, image = np.arange(8) < 5, batch["image"] / np.float32(255)
    image[~real] = np.nan
    return {"image": image, "label": np.where(real, batch["label"], 2), "mask": real}


def start(model, tx=None):
    return init_state(model, tx or optax.sgd(RATE), jax.random.key(0), make_batch()["image"])


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def by_hand(dense, stats, batch):
    """One step of gradient descent on Tiny in float64."""
    x, label = batch["image"].reshape(-1, 4).astype(np.float64) / 255, batch["label"]
    normal = (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)
    logits = normal @ dense["kernel"] + dense["bias"]
    score = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    slope = (score - np.eye(3)[label]) / len(label)
    kernel, bias = dense["kernel"] - RATE * normal.T @ slope, dense["bias"] - RATE * slope.sum(0)
    mean = MOMENTUM * stats["mean"] + (1 - MOMENTUM) * x.mean(0)
    var = MOMENTUM * stats["var"] + (1 - MOMENTUM) * x.var(0)
    loss = -np.log(score[np.arange(len(label)), label]).sum()
    counts = (logits.argmax(1) == label).sum(), len(label)
    return {"kernel": kernel, "bias": bias}, {"mean": mean, "var": var}, loss, counts


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["labels", "shares", "padding"])
def test_one_step_equals_float64_by_hand(kind):
    """With whole labels, with labels as shares of the classes, and with NaN in padding."""
    (state, stats), batch = start(Tiny()), make_batch()
    real = {name: leaf[:5] if kind == "padding" else leaf for name, leaf in batch.items()}
    dense, norm, loss, counts = by_hand(*in_float64((state.params["dense"], stats["norm"])), real)
    if kind == "shares":
        batch["label"] = np.eye(3, dtype=np.float32)[batch["label"]]
    if kind == "padding":
        batch = padded(batch)
    step = jax.jit(functools.partial(train_step, model=Tiny(), tx=optax.sgd(RATE)))
    state, stats, metrics = step(state, stats, batch)
    jax.tree.map(close, (state.params["dense"], stats["norm"], metrics.loss), (dense, norm, loss))
    assert (int(metrics.correct), int(metrics.count)) == counts
    assert int(state.step) == 1


def test_evaluation_depends_on_the_image_and_the_given_statistics_alone():
    """In parts, which merge; with a loss of the caller's; padding counts for nothing."""
    (state, _), batch = start(Tiny()), make_batch()
    mean, var = np.arange(4.0), np.arange(1.0, 5.0)
    stats = {"norm": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}}
    normal = (batch["image"].reshape(8, -1) / 255 - mean) / np.sqrt(var + EPSILON)
    logits = normal @ in_float64(state.params["dense"]["kernel"])
    predicted = predict_step(state.params, stats, batch["image"], model=Tiny())
    np.testing.assert_allclose(
        predicted["score"], np.exp(logits) / np.exp(logits).sum(1, keepdims=True), rtol=1e-4
    )
    np.testing.assert_array_equal(predicted["class"], logits.argmax(1))
    assert predicted["class"].dtype == jnp.int32

    def squared(logits, label):
        return jnp.square(logits - jax.nn.one_hot(label, 3)).sum(-1)

    step = functools.partial(eval_step, state.params, stats, model=Tiny(), loss_fn=squared)
    rest = {name: leaf[5:] for name, leaf in batch.items()}
    metrics = step(padded(batch)).merge(step(rest))
    close(metrics.loss, np.square(logits - np.eye(3)[batch["label"]]).sum())
    correct = (logits.argmax(1) == batch["label"]).sum()
    assert (int(metrics.correct), int(metrics.count)) == (correct, 8)


def test_a_model_without_statistics_or_mask_trains_but_not_on_padding_alone():
    step = functools.partial(train_step, *start(Plain()), model=Plain(), tx=optax.sgd(RATE))
    (first, stats), kernels = start(Plain()), []
    for count in (7, 0):
        after, stats, metrics = step(make_batch() | {"mask": np.arange(8) < count})
        assert stats == {}
        assert int(metrics.count) == count
        kernels.append(after.params["Dense_0"]["kernel"])
    assert not np.array_equal(first.params["Dense_0"]["kernel"], kernels[0])
    np.testing.assert_array_equal(first.params["Dense_0"]["kernel"], kernels[1])
    with pytest.raises(ValueError, match="the metrics have no examples"):
        metrics.means()


def test_other_collections_are_refused_by_name():
    class Spectral(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            self.variable("spectra", "u", jnp.zeros, (3,))
            return nn.Dense(3)(x.reshape(x.shape[0], -1))

    with pytest.raises(ValueError, match=r"Spectral creates the collections \['spectra'\]"):
        start(Spectral())


class Dropping(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(64)(x.reshape(x.shape[0], -1)))


def test_dropout_differs_from_step_to_step_and_repeats_with_the_state():
    state, stats = start(Dropping(), optax.sgd(0.0))
    step = jax.jit(functools.partial(train_step, model=Dropping(), tx=optax.sgd(0.0)))
    second, _, first_loss = step(state, stats, make_batch())
    _, _, again = step(state, stats, make_batch())
    _, _, second_loss = step(second, stats, make_batch())
    assert float(first_loss.loss) == float(again.loss)
    assert float(first_loss.loss) != float(second_loss.loss)
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(second.rng))


def test_scan_over_steps_and_vmap_over_seeds_equal_the_loop():
    step = functools.partial(train_step, model=Tiny(), tx=optax.sgd(RATE))
    begin = functools.partial(init_state, Tiny(), optax.sgd(RATE), images=make_batch()["image"])
    batches = [make_batch(seed) for seed in range(3)]
    keys = jax.random.split(jax.random.key(7), 2)

    def scanned(key):
        def body(carry, batch):
            *carry, metrics = step(*carry, batch)
            return tuple(carry), metrics

        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        (state, stats), _ = jax.lax.scan(body, begin(key), stacked)
        return state.params, stats

    together, jitted = jax.vmap(scanned)(keys), jax.jit(step)
    for i, key in enumerate(keys):
        state, stats = begin(key)
        for batch in batches:
            state, stats, _ = jitted(state, stats, batch)
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), mine, (state.params, stats)
        )


def test_importing_the_steps_brings_no_heavy_module():
    code = "import sys, bnjax.train_step; print(*sys.modules, sep='\\n')"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    heavy = {"tensorflow", "tensorflow_datasets", "orbax", "ml_collections", "sklearn"}
    heavy |= {"tensorboard", "tensorboardX", "tqdm", "PIL"}
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
    """Has an infinite gradient or statistic where the first pixel says so (2 or 3)."""

    @nn.compact
    def __call__(self, x, train):
        kind = x[0, 0, 0, 0]
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(3, name="dense")(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = steepen(x, kind == 2)  # the gradient
        seen = self.variable("batch_stats", "seen", jnp.zeros, ())
        if train:
            seen.value = jnp.where(kind == 3, jnp.nan, seen.value + 1)
        return x


def numbered(first):
    """A batch whose images have the values first, first + 1 and so on."""
    image = np.arange(first, first + 8, dtype=np.float32).reshape(8, 1, 1, 1)
    return make_batch() | {"image": np.tile(image, (1, 2, 2, 1))}


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_is_dropped_whole_if_asked_for(kind):
    tx, batch = optax.adam(RATE), numbered(kind)
    state, stats = start(Poisoned(), tx)

    def losses(logits, label):
        """With kind 1 the loss alone is infinite, and no gradient."""
        return softmax_cross_entropy(logits, label) + (jnp.inf if kind == 1 else 0)

    def step(skips):
        options = {"model": Poisoned(), "tx": tx, "loss_fn": losses, "skip_nonfinite": skips}
        after, new_stats, metrics = jax.jit(functools.partial(train_step, **options))(
            state, stats, batch
        )
        assert int(after.step) == 1
        assert int(metrics.skipped) == (kind != 0 and skips)
        return [metrics.loss, *jax.tree.leaves((after.params, after.opt_state, new_stats))]

    assert all(np.isfinite(leaf).all() for leaf in step(False)) == (kind == 0)
    before = jax.tree.leaves((state.params, state.opt_state, stats))
    kept = [np.array_equal(*pair) for pair in zip(before, step(True)[1:], strict=True)]
    assert all(kept) if kind else not any(kept)


def test_replicas_drop_a_step_together():
    """Only one of two shards meets the bad statistic."""
    shards = jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), numbered(10))
    shards["image"][1, 0] = 3.0
    state, stats = start(Poisoned())
    step = functools.partial(
        train_step, model=Poisoned(), tx=optax.sgd(RATE), axis_name="shards", skip_nonfinite=True
    )
    together = jax.jit(jax.vmap(step, axis_name="shards", in_axes=(None, None, 0)))
    after, new_stats, metrics = together(state, stats, shards)
    np.testing.assert_array_equal(metrics.skipped, [1, 1])
    np.testing.assert_array_equal(new_stats["seen"], [0, 0])
    for row in after.params["dense"]["kernel"]:
        np.testing.assert_array_equal(row, state.params["dense"]["kernel"])


def test_the_loss_against_its_definition_in_float64():
    """With labels and with shares of the classes, smoothed and not; float32 for bfloat16."""
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(6, 4)).astype(np.float32), np.arange(6) % 4
    shares = rng.dirichlet(np.ones(4), 6).astype(np.float32)
    logs = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    for given, target in ((label, np.eye(4)[label]), (shares, shares)):
        for smoothing in (0.0, 0.2):
            smooth = (1 - smoothing) * target + smoothing / 4
            found = softmax_cross_entropy(logits, given, smoothing=smoothing)
            np.testing.assert_allclose(found, -(smooth * logs).sum(1), rtol=1e-5)
    low = jnp.asarray(logits, jnp.bfloat16)
    assert softmax_cross_entropy(low, label).dtype == jnp.float32
