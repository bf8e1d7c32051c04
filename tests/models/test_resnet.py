"""The residual networks against float64 by hand, torch's logits and the published sizes."""

import functools
import json
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import conv, float64, norm, windows

from bnjax import norms
from bnjax.clinic import linen
from bnjax.clinic.folding import difference, plan
from bnjax.clinic.porting import Table, port_from, port_to
from bnjax.models.resnet import RESNETS, TORCHVISION, Block, ResNet
from bnjax.train_step import TrainState, forward, init_variables, train_step

ROOT = Path(__file__).parents[2]
PORT = ROOT / "scripts" / "port_torchvision.py"
NORM = functools.partial(norms.BatchNorm, momentum=0.9)
SMALL = {"stages": (1, 2), "width": 3, "classes": 4, "norm": NORM}
IMAGES = np.random.default_rng(1).uniform(size=(3, 9, 8, 3)).astype(np.float32)
PLACEMENTS = pytest.mark.parametrize("placement", ["before", "pre"])
VARIANTS = {
    "basic": {},
    "padding": {"shortcut": "padding"},
    "bottleneck": {"bottleneck": True},
    "imagenet": {"stem": "imagenet", "bottleneck": True},
}


def shapes(model, images=IMAGES):
    return jax.eval_shape(functools.partial(init_variables, model), jax.random.key(0), images)


def trained(model):
    """Leaves as of a trained network: scales of both signs, no mean of 0, no variance of 1."""
    rng = np.random.default_rng(2)

    def leaf(path, like):
        if path[-1].key == "kernel":
            size = (2 * like.shape[-1] / like.size) ** 0.5
            return rng.normal(0, size, like.shape).astype(like.dtype)
        low = 0.3 if path[-1].key == "var" else -1.0
        return rng.uniform(low, 1.5, like.shape).astype(like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes(model))


def logits(model, params, stats, images=IMAGES):
    run = jax.jit(functools.partial(forward, model=model, train=False))
    return run(params, stats, {"image": images})[0]


def reference(model, params, stats, x):
    """The evaluated network in float64, layer by layer."""
    is_pre, is_large = model.placement == "pre", model.stem == "imagenet"

    def normed(x, name, params=params, stats=stats):
        return norm(x, params[name], stats[name], 1e-5)

    def relu(x):
        return np.maximum(x, 0)

    x = conv(x, params["stem"], 2, 3) if is_large else conv(x, params["stem"], 1, 1)
    x = x if is_pre else relu(normed(x, "stem_norm"))
    x = windows(x, 3, 2, 1, -np.inf).max((3, 4)) if is_large else x
    for block in (f"stage{s + 1}_block{b}" for s, n in enumerate(model.stages) for b in range(n)):
        own, stride, short = (params[block], stats[block]), 2 if block == "stage2_block0" else 1, x
        names = ("conv1", "conv2", "conv3") if model.bottleneck else ("conv1", "conv2")
        for i, name in enumerate(names):
            x = relu(normed(x, f"{name}_norm", *own)) if is_pre else x
            short = x if is_pre and i == 0 and "shortcut" in own[0] else short
            is_strided, edge = i == model.bottleneck, len(own[0][name]["kernel"]) // 2
            x = conv(x, own[0][name], stride if is_strided else 1, edge)
            if not is_pre:
                x = normed(x, f"{name}_norm", *own)
                x = x if name == names[-1] else relu(x)
        if "shortcut" in own[0]:
            short = conv(short, own[0]["shortcut"], stride)
            short = short if is_pre else normed(short, "shortcut_norm", *own)
        elif short.shape != x.shape:
            zeros = np.zeros((*x.shape[:3], x.shape[3] - short.shape[3]))
            short = np.concatenate([short[:, ::stride, ::stride], zeros], 3)
        x = short + x if is_pre else relu(short + x)
    x = relu(normed(x, "last_norm")) if is_pre else x
    return x.mean((1, 2)) @ params["logits"]["kernel"] + params["logits"]["bias"]


@PLACEMENTS
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_equals_float64_by_hand(variant, placement):
    pixels = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.9)}
    model = ResNet(**SMALL | VARIANTS[variant] | pixels, placement=placement)
    params, stats = trained(model)
    standard = (IMAGES.astype(np.float64) - pixels["mean"]) / pixels["std"]
    wanted = reference(model, *float64((params, stats)), standard)
    # A logit is as inexact as the largest, since what is summed is.
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(logits(model, params, stats), wanted, atol=3e-5 * largest)


# He et al., 2016, table 6, with option A; kuangliu/pytorch-cifar; torchvision.
PUBLISHED = {"resnet20": 269_722, "resnet18": 11_173_962, "resnet50": 25_557_032}


@pytest.mark.parametrize("name", RESNETS)
def test_the_published_networks_have_their_parameters(name):
    model = RESNETS[name](norm=NORM, classes=1000 if name == "resnet50" else 10)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(model)[0])) == PUBLISHED[name]


@PLACEMENTS
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_each_block_starts_as_its_shortcut_and_is_not_dead(norm, placement):
    block = Block(width=3, norm=norms.build(norm, groups=3), placement=placement)
    variables = jax.jit(functools.partial(block.init, train=False))(jax.random.key(0), IMAGES)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        y = block.apply(variables | {"params": params}, IMAGES, train=False)
        return jnp.sum(y**2), y

    grads, y = gradient(variables["params"])
    np.testing.assert_array_equal(y, IMAGES)  # which are positive
    layer, leaf = ("conv2", "kernel") if placement == "pre" else ("conv2_norm", "scale")
    assert np.any(grads[layer][leaf])


OTHER_NORMS = [(None, "before"), (None, "pre")]
OTHER_NORMS += [(nn.BatchNorm, "before"), (norms.build("layer"), "pre")]


@pytest.mark.parametrize(("norm", "placement"), OTHER_NORMS)
def test_any_norm_and_low_precision(norm, placement):
    model = ResNet(**SMALL | {"norm": norm}, placement=placement, dtype=jnp.bfloat16)
    params, stats = trained(model)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, stats))} == {np.dtype("float32")}
    found = logits(model, params, stats)
    assert (found.dtype, found.shape) == (jnp.float32, (3, 4))
    assert np.isfinite(found).all()


@PLACEMENTS
def test_padding_counts_for_nothing(placement):
    model, tx = ResNet(**SMALL | {"stages": (1, 1)}, placement=placement), optax.sgd(0.1)
    label = np.array([0, 3, 1], np.int32)
    params, stats = trained(model)
    state = TrainState(np.int32(0), params, tx.init(params), jax.random.key(0))
    step = jax.jit(functools.partial(train_step, model=model, tx=tx))
    padded = {"image": IMAGES.copy(), "label": label, "mask": np.array([True, True, False])}
    padded["image"][2] = 1e3
    wanted = step(state, stats, {"image": IMAGES[:2], "label": label[:2]})
    found = step(state, stats, padded)
    assert found[2].count == 2
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (found[0].params, found[1]), (wanted[0].params, wanted[1]))


@pytest.mark.parametrize("variant", ["padding", "imagenet", "pre"])
def test_every_norm_directly_after_a_convolution_folds(variant):
    model = ResNet(**SMALL | VARIANTS.get(variant, {"placement": variant}))
    params, stats = trained(model)
    network, folded = plan(linen(model, params, stats), IMAGES)
    after = logits(network.model, network.params, network.batch_stats)
    assert difference(logits(model, params, stats), after) < 1e-5
    found = {".".join(one.norm): ".".join(one.layer) for one in folded if one.layer}
    names = [layer.name for layer in linen(model, params, stats).norms({"image": IMAGES})]
    if variant == "pre":
        wanted = {name: name.replace("conv2_norm", "conv1") for name in names if "conv2" in name}
    else:
        wanted = {name: name.removesuffix("_norm") for name in names}
    assert found == wanted


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_weights_are_those_of_torchvision(name):
    script = runpy.run_path(str(PORT))
    measured = json.loads((ROOT / "tests/clinic/port.json").read_text())[f"{name} narrow"]
    model = RESNETS[name](width=8, classes=10, stem="imagenet", norm=NORM)
    uniform, shape = script["uniform"], measured["images"]
    images = uniform("images", int(np.prod(shape))).reshape(shape).transpose(0, 2, 3, 1)
    theirs = {key: script["formula"](key, tuple(of)) for key, of in measured["shapes"].items()}
    table = Table(TORCHVISION)
    params, stats = port_from("torch", theirs, shapes(model, images), table)
    found, wanted = logits(model, params, stats, images), measured["logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    back = port_to("torch", params, stats, table)
    assert back.keys() == theirs.keys()
    for key, value in theirs.items():
        if "num_batches" not in key:  # this norm has no count
            np.testing.assert_array_equal(back[key], value)
