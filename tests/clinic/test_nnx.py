"""Networks of NNX: norms in all calls, flags and transformations, and a modern network."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy_network import padded
from seen import assert_moments, assert_norm_is_seen
from zoo.kit import audit, precise

from bnjax import clinic
from bnjax.clinic.folding import difference, plan

IMAGES = np.random.default_rng(1).random((6, 4, 4, 3)).astype(np.float32)
BATCHES = [{"image": image} for image in (IMAGES[:2], IMAGES[2:])]


class Doubled(nnx.BatchNorm):
    """A norm with another signature that calls its superclass."""

    def __call__(self, inputs, *, train):
        return 2 * super().__call__(inputs + 1, use_running_average=not train)


class Renamed(nnx.BatchNorm):
    """One with the same signature, which changes what it gives its superclass."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(x + 1, use_running_average, mask=mask)


class Rewritten(nnx.BatchNorm):
    """One that computes everything itself."""

    def __call__(self, x, use_running_average=None, *, mask=None):
        return (x - self.mean[...][None]) / jnp.sqrt(self.var[...][None] + self.epsilon)


class Wrapped(nnx.Module):
    """A dense layer and a norm, called by a function of (model, x)."""

    def __init__(self, kind, through):
        self.dense = nnx.Linear(48, 5, rngs=nnx.Rngs(0))
        self.norm = kind(5, rngs=nnx.Rngs(0))
        self.through = through

    def __call__(self, x):
        return self.through(self, x.reshape(len(x), -1))


def normal(model, x):
    return model.norm(model.dense(x))


def conditional(model, x):
    return nnx.cond(x[0, 0] < 1e9, normal, lambda model, x: -x[:, :5], model, x)


BATCH_NORM = functools.partial(functools.partial, nnx.BatchNorm)
# Each: the class of the norm, how it is called, and what the norm adds to its input.
CALLS = {
    "plain": (nnx.BatchNorm, normal, 0),
    "axis_name": (BATCH_NORM(axis_name="devices"), normal, 0),
    "in evaluation": (BATCH_NORM(use_running_average=True), normal, 0),
    "remat": (nnx.BatchNorm, nnx.remat(normal), 0),
    "jit": (nnx.BatchNorm, nnx.jit(normal), 0),
    "cond": (nnx.BatchNorm, conditional, 0),
    "own signature": (Doubled, lambda model, x: model.norm(model.dense(x), train=False), 1),
    "calls its superclass": (Renamed, normal, 1),
    "rewritten": (Rewritten, normal, 0),
    "on another axis": (BATCH_NORM(axis=0), lambda model, x: model.norm(model.dense(x).T).T, 0),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_norm_is_seen_however_it_is_called(name):
    kind, through, added = CALLS[name]
    # `Doubled` is called in evaluation mode.
    known = {"gain": 2, "follows_flag": False} if kind is Doubled else {}
    axes = (1,) if name == "on another axis" else (0,)
    network = clinic.nnx(Wrapped(kind, through))
    assert_norm_is_seen(network, IMAGES, added=added, axes=axes, **known)


class Phased(nnx.Module):
    """A network that is called by another name, or with a mask."""

    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x, mask=None):
        whole = None if mask is None else mask[:, None, None, None]
        return self.norm(x, mask=whole).mean((1, 2))

    def predict(self, x, phase):
        return self.norm(x, use_running_average=phase == "test").mean((1, 2))


def test_a_model_with_a_call_of_its_own_and_one_that_takes_masks():
    def call(model, x, train):
        return model.predict(x, "train" if train else "test")

    called, masked = clinic.nnx(Phased(), call), clinic.nnx(Phased())
    batches = [padded(IMAGES[:2], 4), padded(IMAGES[2:], 6)]
    for network in (called, masked):
        assert_moments(precise(network, batches).batch_stats["norm"], IMAGES)
    for train in (False, True):
        assert [norm.by_batch for norm in called.norms(batches[0], train=train)] == [train]
    assert audit(precise(masked, batches), batches).ids == ()
    with pytest.raises(ValueError, match="takes no `mask`"):
        audit(called, batches)


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(not train)(x).mean((1, 2))


def dropping(model, x):
    """Runs a copy, whose updates are lost."""
    return normal(nnx.clone(model), x)


def tied():
    one, other = (nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))
    other.scale = one.scale
    return nnx.Sequential(one, other)


def bridged():
    return nnx.bridge.ToNNX(OfLinen(), rngs=nnx.Rngs(0)).lazy_init(IMAGES)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (OfLinen, r"needs a flax\.nnx\.Module, not OfLinen"),
        (tied, r"layers\.1 shares scale with another module"),
        (bridged, r"BatchNorm_0 are not NNX modules.*clinic\.linen"),
        (functools.partial(Wrapped, nnx.BatchNorm, dropping), "norm has no unmasked inputs"),
    ],
)
def test_what_cannot_be_done_is_said(make, words):
    with pytest.raises(ValueError, match=words):
        precise(clinic.nnx(make()), BATCHES)


def test_a_norm_behind_a_layer_that_shares_its_kernel_stays():
    first, second = (nnx.Linear(3, 3, rngs=nnx.Rngs(i)) for i in (0, 1))
    second.kernel = first.kernel
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    model = nnx.Sequential(first, nnx.relu, second, norm, lambda x: x.mean((1, 2)))
    mended = precise(clinic.nnx(model), BATCHES)
    assert [one.layer for one in plan(mended, IMAGES).norms] == [None]
    x = second(nnx.relu(first(IMAGES)))
    assert_moments(mended.batch_stats["layers"]["3"], x, atol=1e-5)


def test_a_norm_in_evaluation_mode_stays_in_it_while_others_train():
    one, other = (nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))
    one.eval()
    network = clinic.nnx(nnx.Sequential(one, other, lambda x: x.mean((1, 2))))
    assert [norm.by_batch for norm in network.norms(BATCHES[0], train=True)] == [False, True]


def test_a_norm_in_bfloat16_casts_its_input():
    """NNX casts inputs and averages to the dtype of the output: 0 where 1.999 is right."""
    rng = np.random.default_rng(0)
    x = (1000 + rng.normal(0, 1, (64, 1, 1, 48))).astype(np.float32)
    norm = BATCH_NORM(dtype=jnp.bfloat16, use_fast_variance=False)
    model = Wrapped(norm, lambda model, x: model.norm(x[:, :5]))
    network = precise(clinic.nnx(model), [{"image": x}])
    assert network.norms({"image": x})[0].dtype == jnp.bfloat16
    assert "low-precision" in audit(network, [{"image": x[:32]}, {"image": x[32:]}]).ids


def conv(inputs, filters, size, strides=1, **options):
    return nnx.Conv(inputs, filters, (size, size), strides, use_bias=False, **options)


class Modern(nnx.Module):
    """An inverted residual block with excitation (Tan & Le, 2019), and a norm that stays."""

    def __init__(self, rngs):
        norm = functools.partial(nnx.BatchNorm, epsilon=1e-3, rngs=rngs)
        self.stem = nnx.Sequential(conv(3, 8, 3, 2, rngs=rngs), norm(8), nnx.swish)
        layers = conv(8, 32, 1, rngs=rngs), conv(32, 32, 3, feature_group_count=32, rngs=rngs)
        self.layers = getattr(nnx, "List", list)([*layers, conv(32, 8, 1, rngs=rngs)])
        self.norms = getattr(nnx, "List", list)([norm(32), norm(32), norm(8)])
        self.excite = nnx.Conv(32, 32, (1, 1), rngs=rngs)
        self.drop = nnx.Dropout(0.1, broadcast_dims=(1, 2, 3), rngs=rngs)
        self.last, self.head = norm(16), nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, deterministic):
        flag = {"use_running_average": deterministic}
        x = self.stem(x)
        y = nnx.swish(self.norms[0](self.layers[0](x), **flag))
        y = nnx.swish(self.norms[1](self.layers[1](y), **flag))
        y = y * nnx.sigmoid(self.excite(y.mean((1, 2), keepdims=True)))
        y = self.norms[2](self.layers[2](y), **flag)
        y = x + self.drop(y, deterministic=deterministic)
        y = nnx.relu(self.last(jnp.concatenate([x, y], -1), **flag))
        return self.head(y.mean((1, 2)))


def test_a_modern_network_is_made_precise_folded_and_healthy():
    network, rng = clinic.nnx(Modern(nnx.Rngs(0))), np.random.default_rng(2)

    def shifted(leaf):
        return leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32) * (leaf.ndim == 1)

    network = network.replace(params=jax.tree.map(shifted, network.params))
    batches = [{"image": rng.normal(0, 1, (16, 8, 8, 3)).astype(np.float32)} for _ in range(4)]
    image = batches[0]["image"]
    norms = network.norms(batches[0], train=True)
    names = ["stem.layers.1", "norms.0", "norms.1", "norms.2", "last"]
    assert [norm.name for norm in norms if norm.by_batch] == names
    # With momentum 0 the averages of NNX after one pass are the statistics of the batch.
    model = network.model
    model.train(momentum=0.0, use_fast_variance=False)
    model.drop.rate = 0.0
    nnx.jit(lambda model, x: model(x, False))(model, image)
    mended = precise(network, batches[:1])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, mended.batch_stats, clinic.nnx(model).batch_stats)
    leaves = {f"{name}.{leaf}" for name in names for leaf in ("mean", "var")}
    assert {*clinic.moved(network, mended)} == leaves
    # The last norm stands behind a concatenation and before an activation.
    found = plan(mended, image)
    assert [".".join(one.norm) for one in found.norms if one.layer is None] == ["last"]
    folded = found.network.model
    folded.eval()
    logits, _ = mended.run(batches[0], train=False)
    assert difference(logits, folded(image, deterministic=True)) < 1e-5
    mended = precise(network, batches, by="population")
    assert audit(mended, batches, clinic.Run(batch_size=16)).ids == ()
