"""Weights to PyTorch and Keras and back, against what those compute."""

import functools
import json
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from foreign import NETWORKS, ResNet

from bnjax.clinic.linen import Network
from bnjax.clinic.porting import (
    PortError,
    Table,
    check_logits,
    convert_variance,
    norm_fields,
    our_fields,
    port_from,
    port_to,
    read_table,
    variance_factor,
)
from bnjax.norms import BatchNorm
from bnjax.train_step import forward, init_variables

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "port_torchvision.py"))
MEASURED = json.loads((ROOT / "tests" / "clinic" / "port.json").read_text())
formula, uniform, checksum = (SCRIPT[name] for name in ("formula", "uniform", "checksum"))

# Row for row what torchvision calls the layers of foreign.ResNet.
RESNET = Table(
    {"conv_init": "conv1", "norm_init": "bn1", "Dense_0": "fc"}
    | {
        f"BasicBlock_{i}.{ours}": f"layer{i // 2 + 1}.{i % 2}.{theirs}"
        for i in range(8)
        for ours, theirs in {
            "Conv_0": "conv1",
            "BatchNorm_0": "bn1",
            "Conv_1": "conv2",
            "BatchNorm_1": "bn2",
            "conv_proj": "downsample.0",
            "norm_proj": "downsample.1",
        }.items()
    }
)


class Flat(nn.Module):
    """A depthwise convolution, a norm and a dense layer after flattening, a norm without affine."""

    epsilon: float = 1e-2
    norm: type = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(self.norm, use_running_average=not train, epsilon=1e-5)
        x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
        x = nn.relu(norm(epsilon=self.epsilon, name="norm")(x))
        x = nn.Conv(8, (3, 3), 2, "VALID", feature_group_count=4, name="depthwise")(x)
        x = norm(name="flat_norm")(x.reshape(len(x), -1))
        x = nn.Dense(7, name="dense")(x)
        x = norm(use_scale=False, use_bias=False, name="plain_norm")(x)
        return nn.Dense(5, name="logits")(x)


class KerasFlat(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
        x = nn.relu(norm(epsilon=1e-2, name="norm")(x))
        x = nn.Conv(8, (3, 3), padding="VALID", feature_group_count=4, name="depthwise")(x)
        x = norm(epsilon=1e-3, use_scale=False, name="flat_norm")(x.reshape(len(x), -1))
        return nn.Dense(5, name="logits")(x)


FLAT = Table(flattened={"flat_norm": (3, 2, 8), "dense": (3, 2, 8)})
TORCH = {
    "resnet18 narrow": (ResNet(width=8, torchvision=True), RESNET),
    "resnet18": (ResNet(classes=1000, torchvision=True), RESNET),
    "flat": (Flat(), FLAT),
}


def images_of(name):
    """What the script gave torch, [n, c, h, w] there and [n, h, w, c] here."""
    shape = MEASURED[name]["images"]
    images = uniform("images", int(np.prod(shape))).reshape(shape)
    return images if name == "keras" else images.transpose(0, 2, 3, 1)


def shapes_of(model, name):
    return jax.eval_shape(
        functools.partial(init_variables, model, jax.random.key(0)), images_of(name)
    )


def by_formula(like):
    """Two trees of the shapes of `like`."""
    return tuple(
        unflatten_dict(
            {path: formula(".".join(path), leaf.shape) for path, leaf in flatten_dict(tree).items()}
        )
        for tree in like
    )


def theirs(name):
    """The other framework's leaves, by the formula."""
    return {key: formula(key, tuple(shape)) for key, shape in MEASURED[name]["shapes"].items()}


def kept(logits, name):
    return logits[:, :: SCRIPT["EVERY"].get(name, 1)]


@pytest.mark.parametrize("name", TORCH)
def test_from_torch_the_logits_are_those_of_torch(name):
    model, table = TORCH[name]
    params, stats = port_from("torch", theirs(name), shapes_of(model, name), table)
    logits, _ = forward(params, stats, {"image": images_of(name)}, model=model, train=False)
    np.testing.assert_allclose(
        kept(logits, name), MEASURED[name]["from_torch"]["logits"], atol=1e-4
    )


@pytest.mark.parametrize("name", TORCH)
def test_to_torch_every_leaf_is_where_torch_has_it(name):
    model, table = TORCH[name]
    params, stats = by_formula(shapes_of(model, name))
    arrays, measured = port_to("torch", params, stats, table), MEASURED[name]["to_torch"]
    assert {key: list(value.shape) for key, value in arrays.items()} == MEASURED[name]["shapes"]
    for key, value in arrays.items():
        assert value.flags.c_contiguous, key  # safetensors writes memory as it lies
        assert checksum(key, value) == pytest.approx(measured["checksums"][key], rel=1e-4), key
    logits, _ = forward(params, stats, {"image": images_of(name)}, model=model, train=False)
    np.testing.assert_allclose(kept(logits, name), measured["logits"], atol=1e-4)


def test_keras_both_ways():
    model, arrays = KerasFlat(), theirs("keras")
    like = shapes_of(model, "keras")
    table = Table(depthwise={"depthwise": 2}, flattened={"flat_norm": (5, 4, 8)})
    params, stats = port_from("keras", arrays, like, table)
    logits = np.array(MEASURED["keras"]["logits"])
    assert check_logits(model, params, stats, images_of("keras"), logits) < 1e-5
    back = port_to("keras", params, stats, table)
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(back[key], value, strict=True)


@pytest.mark.parametrize("framework", ["torch", "keras"])
@pytest.mark.parametrize("name", ["resnet", "preact", "remat", "shared"])
def test_there_and_back_is_the_identity(name, framework):
    model = NETWORKS[name]
    variables = init_variables(model, jax.random.key(1), np.zeros((1, 8, 8, 3), np.float32))
    variables = by_formula(variables)
    arrays = port_to(framework, *variables)
    back = port_from(framework, arrays, variables)
    jax.tree.map(functools.partial(np.testing.assert_array_equal, strict=True), back, variables)


def test_layouts_are_those_of_numpy():
    kernel, rows = np.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5), np.arange(24.0).reshape(12, 2)
    params = {"a": {"kernel": kernel}, "b": {"kernel": rows, "bias": np.arange(2.0)}}
    found = port_to("torch", params, {}, Table({"{x}": "net.{x}"}, {"b": (2, 3, 2)}))
    for o in range(5):
        for i in range(4):
            np.testing.assert_array_equal(found["net.a.weight"][o, i], kernel[:, :, i, o])
    image = np.arange(12.0).reshape(2, 3, 2)  # what torch flattens is [c, h, w]
    np.testing.assert_array_equal(
        found["net.b.weight"] @ image.transpose(2, 0, 1).ravel(), image.ravel() @ rows
    )
    np.testing.assert_array_equal(found["net.b.bias"], [0, 1])


def test_stacked_layers_and_unknown_leaves_are_refused():
    for name in ("scan", "vmap"):
        image = np.zeros((1, 8, 8, 3), np.float32)
        variables = init_variables(NETWORKS[name], jax.random.key(0), image)
        with pytest.raises(PortError, match="taken apart first"):
            port_to("torch", *variables)
    with pytest.raises(PortError, match=r"params\.a\.threshold.*no counterpart"):
        port_to("torch", {"a": {"threshold": np.ones(3)}}, {})


def test_every_key_is_accounted_for():
    model, table = TORCH["resnet18 narrow"]
    like, arrays = shapes_of(model, "resnet18 narrow"), theirs("resnet18 narrow")
    arrays["layer9.weight"] = arrays.pop("layer2.0.downsample.1.running_var")
    arrays["extra"] = arrays.pop("fc.bias")
    arrays["fc.weight"] = arrays["fc.weight"].T
    with pytest.raises(PortError) as refused:
        port_from("torch", arrays, like, table)
    said = [line.strip() for line in str(refused.value).splitlines()]
    assert said[1:9] == [
        "Needed here, and not there:",
        "fc.bias (params.Dense_0.bias)",
        "layer2.0.downsample.1.running_var (batch_stats.BasicBlock_2.norm_proj.var)",
        "There, and not needed here:",
        "layer9.weight",
        "extra",
        "Of another shape:",
        "fc.weight is [64, 10] and has to be [10, 64]",
    ]


def test_a_table_that_does_not_fit_is_refused(tmp_path):
    params = {"a": {"kernel": np.ones((2, 2))}, "b": {"kernel": np.ones((2, 2))}}
    with pytest.raises(PortError, match=r"no row of names fits:\s+b"):
        port_to("torch", params, {}, Table({"a": "x"}))
    with pytest.raises(PortError, match=r"would both be x\.weight"):
        port_to("torch", params, {}, Table({"{any}": "x"}))
    with pytest.raises(PortError, match=r"not in the network:\s+c"):
        port_to("torch", params, {}, Table(flattened={"c": (1, 1, 2)}))
    with pytest.raises(PortError, match=r"flattened images of \[2, 2, 2\]"):
        port_to("torch", params, {}, Table(flattened={"a": (2, 2, 2)}))
    file = tmp_path / "table.json"
    file.write_text('{"names": {"{a}.{b}": "{b}/{a}"}, "flattened": {"x": [1, 2, 3]}}')
    assert read_table(file).name("p.q", "keras") == "q/p"
    assert read_table(file).flattened == {"x": (1, 2, 3)}
    for wrong in ('{"names": {"{a}": "{b}"}}', '{"nam": {}}', "[]", "{", '{"flattened": {"x": 1}}'):
        file.write_text(wrong)
        with pytest.raises(PortError, match="is no table of layers"):
            read_table(file)


def test_a_wrong_epsilon_is_refused_by_the_probe():
    like, logits = shapes_of(Flat(), "flat"), np.array(MEASURED["flat"]["from_torch"]["logits"])
    params, stats = port_from("torch", theirs("flat"), like, FLAT)
    assert check_logits(Flat(), params, stats, images_of("flat"), logits) < 1e-5
    with pytest.raises(PortError, match=r"differ by up to 0\.0.*another epsilon"):
        check_logits(Flat(epsilon=1e-3), params, stats, images_of("flat"), logits)
    with pytest.raises(PortError, match="differ by up to nan"):
        check_logits(Flat(), params, stats, images_of("flat"), logits * np.nan)
    with pytest.raises(PortError, match=r"shape \[3, 5\]"):
        check_logits(Flat(), params, stats, images_of("flat"), logits[:, :4])
    # Without its shape the dense layer takes the columns in the wrong order.
    params, stats = port_from("torch", theirs("flat"), like)
    with pytest.raises(PortError, match="under flattened"):
        check_logits(Flat(), params, stats, images_of("flat"), logits)


def test_updates_are_counted_where_the_norm_counts_them():
    norm = functools.partial(BatchNorm, momentum=None, use_running_average=True)
    made = norm().init(jax.random.key(0), jnp.ones((2, 3)))
    like = ({"n": made["params"]}, {"n": made["batch_stats"]})
    arrays = theirs_norm(3)
    _, found = port_from("torch", arrays, like)
    assert found["n"]["count"] == 5
    assert found["n"]["count"].dtype == jnp.int32
    back = port_to("torch", like[0], found)["n.num_batches_tracked"]
    assert back == 5
    assert back.dtype == np.int64
    del arrays["n.num_batches_tracked"]  # as files of old versions
    with pytest.raises(PortError, match=r"n\.num_batches_tracked \(batch_stats\.n\.count\)"):
        port_from("torch", arrays, like)


def theirs_norm(size):
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"n.{name}": formula(name, (size,)) for name in names}


def test_a_norm_with_a_shift_alone_has_a_scale_of_ones_in_torch():
    stats = {"n": {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}}
    params = {"n": {"bias": np.full(3, 2, np.float32)}}
    arrays = port_to("torch", params, stats)
    np.testing.assert_array_equal(arrays["n.weight"], [1, 1, 1])
    assert "n.weight" not in port_to("torch", {}, stats)  # affine=False
    back, _ = port_from("torch", arrays, (params, stats))
    np.testing.assert_array_equal(back["n"]["bias"], [2, 2, 2])
    arrays["n.weight"][1] = 0.5
    with pytest.raises(PortError, match=r"not needed here:\s+n\.weight"):
        port_from("torch", arrays, (params, stats))


def test_fields_of_norms():
    for framework, momentum, wanted in (
        ("torch", 0.1, {"epsilon": 1e-5, "momentum": 0.9, "variance": "unbiased"}),
        ("keras", 0.99, {"epsilon": 1e-5, "momentum": 0.99, "variance": "biased"}),
    ):
        assert our_fields(framework, 1e-5, momentum) == wanted
    assert norm_fields("torch", 1e-3, 0.99) == {"eps": 1e-3, "momentum": 0.01}
    assert norm_fields("keras", 1e-3, 0.99) == {"epsilon": 1e-3, "momentum": 0.99}
    assert norm_fields("torch", 1e-3, None)["momentum"] is None
    assert our_fields("torch", 1e-3, None)["momentum"] is None
    with pytest.raises(PortError, match="no counterpart"):
        norm_fields("keras", 1e-3, None)


def test_fields_are_those_that_make_the_same_averages():
    """What torch and Keras stored after three updates, by tests/norms/conventions.json."""
    table = json.loads((ROOT / "tests" / "norms" / "conventions.json").read_text())
    for framework, momentum in (("torch", 1 - table["kept"]), ("keras", table["kept"])):
        fields = our_fields(framework, table["epsilon"], momentum)
        for size, batches in table["batches"].items():
            norm = BatchNorm(use_running_average=False, **fields)
            x = jnp.array(batches, jnp.float32)
            stats = norm.init(jax.random.key(0), x[0])
            for batch in x:
                _, new = norm.apply(stats, batch, mutable=["batch_stats"])
                stats = {**stats, **new}
            wanted = table["frameworks"][framework]["sizes"][size]["var"]
            np.testing.assert_allclose(stats["batch_stats"]["var"], wanted, rtol=1e-5)


def test_stored_variance_is_converted_by_the_values_of_each_layer():
    model, image = Flat(norm=BatchNorm), images_of("flat")
    params, stats = by_formula(shapes_of(model, "flat"))
    layers = Network(params, stats, model).norms({"image": image})
    # 6 examples of 7x6 positions after the first convolution, and of 1 once they are flattened.
    for stored, factor in (("unbiased", 251 / 252), ("biased", 1)):
        found = convert_variance(stats, layers, 6, stored=stored)["norm"]["var"]
        np.testing.assert_allclose(found, stats["norm"]["var"] * factor, rtol=1e-6)
    there = convert_variance(stats, layers, 6, wanted="unbiased")
    np.testing.assert_allclose(
        there["flat_norm"]["var"], stats["flat_norm"]["var"] * 1.2, rtol=1e-6
    )
    np.testing.assert_array_equal(there["norm"]["mean"], stats["norm"]["mean"])
    model = Flat(norm=functools.partial(BatchNorm, variance="unbiased"))
    unbiased = Network(params, stats, model).norms({"image": image})
    same = convert_variance(stats, unbiased, 6, wanted="unbiased")
    np.testing.assert_array_equal(same["norm"]["var"], stats["norm"]["var"])
    with pytest.raises(PortError, match="2 or more"):
        convert_variance(stats, layers, 1, wanted="unbiased")


def test_variance_of_a_batch_by_numpy():
    x = np.random.default_rng(0).normal(size=7)
    assert x.var() * variance_factor("biased", "unbiased", 7) == pytest.approx(x.var(ddof=1))
    assert x.var(ddof=1) * variance_factor("unbiased", "biased", 7) == pytest.approx(x.var())
