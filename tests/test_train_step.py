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

from bnjax.loss import softmax_cross_entropy
from bnjax.train_step import eval_step, init_state, predict_step, train_step

pytestmark = pytest.mark.lane

MOMENTUM, EPSILON, RATE = 0.75, 1e-3, 0.1
SGD, LABELS = optax.sgd(RATE), np.eye(3, dtype=np.float32)


class Tiny(nn.Module):
    """BN without scale and shift, and one dense layer: small enough to do by hand."""

    @nn.compact
    def __call__(self, x, *, train, mask=None):
        full = None if mask is None else mask[:, None]
        norm = nn.BatchNorm(
            not train, momentum=MOMENTUM, epsilon=EPSILON, use_scale=False, use_bias=False
        )
        return nn.Dense(3)(norm(x.reshape(x.shape[0], -1), mask=full))


class Plain(nn.Module):
    """A stranger's model: no mask, no statistics, and perhaps a collection of its own."""

    collection: str = ""

    @nn.compact
    def __call__(self, x, train):
        if self.collection:
            self.variable(self.collection, "u", jnp.zeros, (3,))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (8, 2, 2, 1), np.uint8),
        "label": rng.integers(0, 3, 8).astype(np.int32),
    }


def padded(batch):
    """Replaces the last three images by padding of NaN, with other labels."""
    real, image = np.arange(8) < 5, batch["image"] / np.float32(255)
    image[~real] = np.nan
    return {"image": image, "label": np.where(real, batch["label"], np.arange(8) % 3), "mask": real}


def start(model, tx=SGD):
    return init_state(model, tx, jax.random.key(0), make_batch()["image"])


def jitted(model, tx=SGD, **options):
    return jax.jit(functools.partial(train_step, model=model, tx=tx, **options))


def in_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def by_hand(dense, stats, image, target):
    """One step of gradient descent on Tiny in float64; `target` holds shares of the classes."""
    x = image.reshape(-1, 4).astype(np.float64) / 255
    normal = (x - x.mean(0)) / np.sqrt(x.var(0) + EPSILON)
    logits = normal @ dense["kernel"] + dense["bias"]
    score = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    slope = (score - target) / len(target)
    kernel, bias = dense["kernel"] - RATE * normal.T @ slope, dense["bias"] - RATE * slope.sum(0)
    mean = MOMENTUM * stats["mean"] + (1 - MOMENTUM) * x.mean(0)
    var = MOMENTUM * stats["var"] + (1 - MOMENTUM) * x.var(0)
    correct = (logits.argmax(1) == target.argmax(1)).sum()
    after = {"kernel": kernel, "bias": bias}, {"mean": mean, "var": var}
    return *after, -(target * np.log(score)).sum(), correct, len(target)


def close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "smoothing"), [("labels", 0.0), ("labels", 0.2), ("shares", 0.2), ("padding", 0.0)]
)
def test_one_step_equals_float64_by_hand(kind, smoothing):
    """With whole labels, with labels as shares of the classes, and with NaN in padding."""
    (state, stats), batch = start(Tiny()), make_batch()
    real, target = batch["image"], LABELS[batch["label"]]
    if kind == "shares":
        batch["label"] = target = np.random.default_rng(1).dirichlet(np.ones(3), 8)
    if kind == "padding":
        batch, real, target = padded(batch), real[:5], target[:5]
    target = (1 - smoothing) * target + smoothing / 3
    before = state.params["Dense_0"], stats["BatchNorm_0"]
    wanted = by_hand(*in_float64(before), real, target)
    loss_fn = functools.partial(softmax_cross_entropy, smoothing=smoothing)
    state, stats, metrics = jitted(Tiny(), loss_fn=loss_fn)(state, stats, batch)
    after = state.params["Dense_0"], stats["BatchNorm_0"]
    jax.tree.map(close, (*after, metrics.loss, metrics.correct, metrics.count), wanted)
    assert int(state.step) == 1


def test_the_loss_of_bfloat16_logits_is_float32():
    assert softmax_cross_entropy(jnp.zeros((1, 2), jnp.bfloat16), np.array([0])).dtype == "float32"


def test_evaluation_depends_on_the_image_and_the_given_statistics_alone():
    """In parts, which merge; with a loss of the caller's; padding counts for nothing."""
    (state, _), batch = start(Tiny()), make_batch()
    mean, var = np.arange(4.0), np.arange(1.0, 5.0)
    stats = {"BatchNorm_0": {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}}
    normal = (batch["image"].reshape(8, -1) / 255 - mean) / np.sqrt(var + EPSILON)
    logits = normal @ in_float64(state.params["Dense_0"]["kernel"])
    predicted = predict_step(state.params, stats, batch["image"], model=Tiny())
    score = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(predicted["score"], score, rtol=1e-4)
    np.testing.assert_array_equal(predicted["class"], logits.argmax(1))
    assert predicted["class"].dtype == jnp.int32

    def squared(logits, label):
        return jnp.square(logits - LABELS[label]).sum(-1)

    step = functools.partial(eval_step, state.params, stats, model=Tiny(), loss_fn=squared)
    metrics = step(padded(batch)).merge(step({name: leaf[5:] for name, leaf in batch.items()}))
    close(metrics.loss, squared(logits, batch["label"]).sum())
    correct = (logits.argmax(1) == batch["label"]).sum()
    assert (int(metrics.correct), int(metrics.count)) == (correct, 8)


def test_a_model_without_statistics_or_mask_trains_but_not_on_padding_alone():
    (state, stats), kernels = start(Plain()), []
    for count in (7, 0):
        after, new, metrics = jitted(Plain())(
            state, stats, make_batch() | {"mask": np.arange(8) < count}
        )
        assert (new, int(metrics.count)) == ({}, count)
        kernels.append(after.params["Dense_0"]["kernel"])
    assert not np.array_equal(state.params["Dense_0"]["kernel"], kernels[0])
    np.testing.assert_array_equal(state.params["Dense_0"]["kernel"], kernels[1])
    with pytest.raises(ValueError, match="the metrics have no examples"):
        metrics.means()


def test_other_collections_are_refused_by_name():
    with pytest.raises(ValueError, match=r"Plain creates the collections \['spectra'\]"):
        start(Plain("spectra"))


def test_scan_over_steps_and_vmap_over_seeds_equal_the_loop():
    batches = [make_batch(seed) for seed in range(3)]
    keys, step = jax.random.split(jax.random.key(7), 2), jitted(Tiny())
    begin = functools.partial(init_state, Tiny(), SGD, images=make_batch()["image"])

    def scanned(key):
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
        return jax.lax.scan(lambda both, one: (step(*both, one)[:2], None), begin(key), stacked)[0]

    together = jax.vmap(scanned)(keys)
    for i, key in enumerate(keys):
        alone = begin(key)
        for batch in batches:
            *alone, _ = step(*alone, batch)
        (mine, *stats), (its, *others) = jax.tree.map(lambda leaf, i=i: leaf[i], together), alone
        check = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
        jax.tree.map(check, (mine.params, stats), (its.params, others))


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
        x = steepen(nn.Dense(3)(nn.BatchNorm(not train)(x.reshape(x.shape[0], -1))), kind == 2)
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
    tx = optax.adam(RATE)
    state, stats = start(Poisoned(), tx)

    def losses(logits, label):
        """With kind 1 the loss alone is infinite, and no gradient."""
        return softmax_cross_entropy(logits, label) + (jnp.inf if kind == 1 else 0)

    def step(skips):
        options = {"loss_fn": losses, "skip_nonfinite": skips}
        after, new, metrics = jitted(Poisoned(), tx, **options)(state, stats, numbered(kind))
        assert int(after.step) == 1
        assert int(metrics.skipped) == (kind != 0 and skips)
        return [metrics.loss, *jax.tree.leaves((after.params, after.opt_state, new))]

    assert all(np.isfinite(leaf).all() for leaf in step(False)) == (kind == 0)
    before = jax.tree.leaves((state.params, state.opt_state, stats))
    kept = [np.array_equal(*pair) for pair in zip(before, step(True)[1:], strict=True)]
    assert all(kept) if kind else not any(kept)


def test_replicas_drop_a_step_together():
    """Only one of two shards meets the bad statistic."""
    shards = jax.tree.map(lambda leaf: leaf.reshape(2, 4, *leaf.shape[1:]), numbered(10))
    shards["image"][1, 0] = 3.0
    state, stats = start(Poisoned())
    step = jitted(Poisoned(), axis_name="shards", skip_nonfinite=True)
    together = jax.vmap(step, axis_name="shards", in_axes=(None, None, 0))
    after, new_stats, metrics = together(state, stats, shards)
    np.testing.assert_array_equal(metrics.skipped, [1, 1])
    np.testing.assert_array_equal(new_stats["seen"], [0, 0])
    for row in after.params["Dense_0"]["kernel"]:
        np.testing.assert_array_equal(row, state.params["Dense_0"]["kernel"])
