"""The ConvNet against a NumPy float64 network that is written from the tutorial's description."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import conv, float64, norm, windows

from bnjax.models.convnet import ACTIVATIONS, ConvNet

NORM = functools.partial(nn.BatchNorm, momentum=0.75, epsilon=1e-3)
SMALL = {"filters": (2, 3), "kernels": (3, 2), "strides": (2, 1), "dense": (7, 5)}


def shapes(model, side=32, channels=3):
    images = jax.ShapeDtypeStruct((2, side, side, channels), jnp.float32)
    return jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)


def random(model, side, channels):
    """Variables: no scale of one or shift of zero hides a mistake."""
    draw, like = np.random.default_rng(0).uniform, shapes(model, side, channels)
    return jax.tree.map(lambda leaf: draw(0.2, 1.0, leaf.shape).astype(np.float32), like)


def reference(variables, x, *, placement, pooling, norm_dense, activation):
    """The evaluated network in float64, layer by layer."""
    params, stats = (float64(variables[name]) for name in ("params", "batch_stats"))

    def normed(x, layer, where, wanted=True):
        name = f"{layer}_norm"
        return norm(x, params[name], stats[name], 1e-3) if wanted and where == placement else x

    for i, stride in enumerate(SMALL["strides"]):
        name = f"conv{i}"
        x = conv(normed(x, name, "pre"), params[name], stride if pooling == "none" else 1)
        x = normed(activation(normed(x, name, "before")), name, "after")
        if pooling != "none":
            squares = windows(x, stride, stride)
            x = squares.max((3, 4)) if pooling == "max" else squares.mean((3, 4))
    x = x.reshape(len(x), -1)
    places = zip(("dense0", "dense1", "logits"), (True, *norm_dense), (*norm_dense, 0), strict=True)
    for name, before, after in places:
        x = normed(x, name, "pre", before) @ params[name]["kernel"] + params[name]["bias"]
        if name != "logits":
            x = normed(activation(normed(x, name, "before", after)), name, "after", after)
    return x


@pytest.mark.parametrize("placement", ["pre", "before", "after"])
@pytest.mark.parametrize(
    ("pooling", "norm_dense", "activation", "by_hand"),
    [
        ("none", (True, True), "relu", lambda x: np.maximum(x, 0)),
        ("max", (False, False), "sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("avg", (True, False), "tanh", np.tanh),
    ],
)
def test_the_network_equals_float64_by_hand(placement, pooling, norm_dense, activation, by_hand):
    options = {"placement": placement, "pooling": pooling, "norm_dense": norm_dense}
    model = ConvNet(**SMALL | options, classes=4, norm=NORM, activation=ACTIVATIONS[activation])
    x = np.random.default_rng(1).uniform(size=(3, 11, 11, 2)).astype(np.float32) - 0.5
    variables = random(model, 11, 2)
    found = jax.jit(functools.partial(model.apply, train=False))(variables, x)
    wanted = reference(variables, x.astype(np.float64), **options, activation=by_hand)
    np.testing.assert_allclose(found, wanted, rtol=2e-5)


def test_the_tutorials_network_has_its_27_9_million_parameters():
    conv = 3 * 3 * (3 * 30 + 30 * 50 + 50 * 60) + 30 + 50 + 60
    dense = 7260 * 3500 + 3500 + 3500 * 700 + 700 + 700 * 10 + 10
    scale_shift = 2 * (3 + 30 + 50 + 7260 + 3500 + 700)
    for kind, wanted in ((None, conv + dense), (NORM, conv + dense + scale_shift)):
        params = jax.tree.leaves(shapes(ConvNet(norm=kind))["params"])
        assert sum(leaf.size for leaf in params) == wanted
    assert f"{wanted / 1e6:.1f}" == "27.9"


def test_weights_are_glorot_uniform_and_biases_zero():
    init = jax.jit(functools.partial(ConvNet(dense=(350, 200)).init, train=False))
    params = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    for name, fan_in, fan_out in (("conv1", 9 * 30, 9 * 50), ("dense1", 350, 200)):
        kernel, limit = np.asarray(params[name]["kernel"]), np.sqrt(6 / (fan_in + fan_out))
        assert 0.99 * limit < np.abs(kernel).max() <= limit
        assert kernel.std() == pytest.approx(limit / np.sqrt(3), rel=2e-2)
        assert not np.any(params[name]["bias"])


def test_dropout_drops_the_right_share_in_training_only():
    no_conv = {"filters": (), "kernels": (), "strides": ()}
    model = ConvNet(**no_conv, dense=(20000, 8), dropout=(0.4, 0.0), classes=2)
    x, variables = jnp.ones((1, 2, 2, 1)), random(model, 2, 1)
    options = {"capture_intermediates": lambda module, _: isinstance(module, nn.Dropout)}
    for train, share in ((True, 0.4), (False, 0.0)):
        key = {"dropout": jax.random.key(1)}
        _, seen = model.apply(variables, x, train=train, rngs=key, mutable=[], **options)
        (out,) = (leaf for leaf in jax.tree.leaves(seen) if leaf.shape[1] == 20000)
        assert float((out == 0).mean()) == pytest.approx(share, abs=0.02 * train)


def test_parameters_and_logits_are_float32_in_low_precision():
    model = ConvNet(**SMALL, norm=NORM, dtype=jnp.bfloat16)
    run = functools.partial(model.apply, train=False)
    found = jax.eval_shape(run, shapes(model, 11, 2), jnp.ones((2, 11, 11, 2)))
    leaves = jax.tree.leaves((found, shapes(model, 11, 2)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
