"""Weights to PyTorch and Keras and back, against what those compute."""

import functools
import json
import pickle
import runpy
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from foreign import ResNet, shapes

from bnjax.clinic import porting
from bnjax.clinic.porting import Table, port_from, port_to, read_table
from bnjax.errors import UserError
from bnjax.train_step import forward

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "port_torchvision.py"))
MEASURED = json.loads((ROOT / "tests" / "clinic" / "port.json").read_text())
formula, uniform = SCRIPT["formula"], SCRIPT["uniform"]

# Torchvision's names of the layers of foreign.ResNet.
BLOCK = {"Conv_0": "conv1", "BatchNorm_0": "bn1", "Conv_1": "conv2", "BatchNorm_1": "bn2"}
BLOCK |= {"conv_proj": "downsample.0", "norm_proj": "downsample.1"}
RESNET = Table(
    {"conv_init": "conv1", "norm_init": "bn1", "Dense_0": "fc"}
    | {
        f"BasicBlock_{i}.{ours}": f"layer{i // 2 + 1}.{i % 2}.{theirs}"
        for i in range(8)
        for ours, theirs in BLOCK.items()
    }
)


class Flat(nn.Module):
    """A depthwise convolution, a norm after flattening, and norms without scale or bias."""

    keras: bool

    @nn.compact
    def __call__(self, x, train):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        stride, epsilon = (1, 1e-3) if self.keras else (2, 1e-5)
        x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
        x = nn.relu(norm(epsilon=1e-2, name="norm")(x))
        x = nn.Conv(8, (3, 3), stride, "VALID", feature_group_count=4, name="depthwise")(x)
        x = x.reshape(len(x), -1)
        x = norm(epsilon=epsilon, use_scale=not self.keras, name="flat_norm")(x)
        if not self.keras:
            x = nn.Dense(7, name="dense")(x)
            x = norm(use_scale=False, use_bias=False, name="plain_norm")(x)
        return nn.Dense(5, name="logits")(x)


PORTED = {
    "resnet18 narrow": ("torch", ResNet(width=8, torchvision=True), RESNET),
    "flat": ("torch", Flat(False), Table(flattened={"flat_norm": (3, 2, 8), "dense": (3, 2, 8)})),
    "keras": ("keras", Flat(True), Table()),
    "resnet18": ("torch", ResNet(classes=1000, torchvision=True), RESNET),
}
FULL_SIZE = pytest.param("resnet18", marks=pytest.mark.slow)


def images_of(name):
    """The images that the script gave the other framework, as [n, h, w, c]."""
    shape = MEASURED[name]["images"]
    images = uniform("images", int(np.prod(shape))).reshape(shape)
    return images if name == "keras" else images.transpose(0, 2, 3, 1)


def theirs(name):
    """The other framework's leaves, by the formula."""
    return {key: formula(key, tuple(shape)) for key, shape in MEASURED[name]["shapes"].items()}


@pytest.mark.parametrize("name", ["resnet18 narrow", "flat", "keras", FULL_SIZE])
def test_the_same_logits_and_the_same_arrays_back(name):
    framework, model, table = PORTED[name]
    arrays, images = theirs(name), images_of(name)
    params, stats = port_from(framework, arrays, shapes(model, images), table)
    run = jax.jit(functools.partial(forward, model=model, train=False))
    logits, _ = run(params, stats, {"image": images})
    logits = logits[:, :: SCRIPT["EVERY"].get(name, 1)]
    np.testing.assert_allclose(logits, MEASURED[name]["logits"], atol=1e-4)
    back = port_to(framework, params, stats, table)
    assert back.keys() == arrays.keys()
    for key, value in arrays.items():
        assert back[key].flags.c_contiguous, key  # safetensors writes memory as it lies
        if "num_batches_tracked" not in key:  # which these norms do not count
            # A depthwise kernel of Keras is that of a grouped convolution here.
            np.testing.assert_array_equal(back[key].reshape(value.shape), value)
            assert back[key].shape == value.shape or framework == "keras"


def test_every_key_is_accounted_for():
    _, model, table = PORTED["resnet18 narrow"]
    like, arrays = shapes(model, images_of("resnet18 narrow")), theirs("resnet18 narrow")
    arrays["layer9.weight"] = arrays.pop("layer2.0.downsample.1.running_var")
    arrays["fc.weight"] = arrays["fc.weight"].T
    with pytest.raises(UserError) as refused:
        port_from("torch", arrays, like, table)
    said = [line.strip() for line in str(refused.value).splitlines()]
    assert said[1:7] == [
        "Missing in the arrays:",
        "layer2.0.downsample.1.running_var (batch_stats.BasicBlock_2.norm_proj.var)",
        "Not in this network:",
        "layer9.weight",
        "Different shapes:",
        "fc.weight is [64, 10], but must be [10, 64]",
    ]


TWO = {"a": {"kernel": np.ones((2, 2))}, "b": {"kernel": np.ones((2, 2))}}


@pytest.mark.parametrize(
    ("params", "table", "words"),
    [
        (TWO, Table({"a": "x"}), "matches the layer b"),
        (TWO, Table({"{any}": "x"}), r"would both be x\.weight"),
        (TWO, Table(flattened={"c": (1, 1, 2)}), "not in the network: c"),
        (TWO, Table(flattened={"a": (2, 2, 2)}), r"does not fit flattened \[2, 2, 2\]"),
        ({"a": {"threshold": np.ones(3)}}, Table(), r"params\.a\.threshold.*no counterpart"),
        ({"a": {"scale": np.ones((3, 3))}}, Table(), "split layers that are stacked"),
        ({"a": {"count": np.ones(3, int)}}, Table(), "split layers that are stacked"),
    ],
)
def test_what_does_not_fit_is_refused(params, table, words):
    with pytest.raises(UserError, match=words):
        port_to("torch", params, {}, table)


def test_a_table_is_json(tmp_path):
    file = tmp_path / "table.json"
    file.write_text('{"names": {"{a}.{b}": "{b}/{a}"}, "flattened": {"x": [1, 2, 3]}}')
    assert read_table(file).name("p.q", "keras") == "q/p"
    assert read_table(file).flattened == {"x": (1, 2, 3)}
    for wrong in ('{"names": {"{a}": "{b}"}}', '{"nam": {}}', "[]", "{", '{"flattened": {"x": 1}}'):
        file.write_text(wrong)
        with pytest.raises(UserError, match="is not a valid table of layers"):
            read_table(file)


def test_updates_are_counted_where_the_norm_counts_them():
    stats = {"mean": np.zeros(3), "var": np.ones(3), "count": np.int32(0)}
    like = {"n": {"scale": np.ones(3), "bias": np.zeros(3)}}, {"n": stats}
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    arrays = {f"n.{name}": formula(name, (3,)) for name in names}
    _, found = port_from("torch", arrays, like)
    assert (found["n"]["count"], found["n"]["count"].dtype) == (5, jnp.int32)
    back = port_to("torch", like[0], found)["n.num_batches_tracked"]
    assert (back, back.dtype) == (5, np.int64)
    del arrays["n.num_batches_tracked"]  # as files of old versions
    with pytest.raises(UserError, match=r"n\.num_batches_tracked \(batch_stats\.n\.count\)"):
        port_from("torch", arrays, like)


def test_a_norm_with_a_shift_alone_has_a_scale_of_ones_in_torch():
    stats = {"n": {"mean": np.zeros(3, np.float32), "var": np.ones(3, np.float32)}}
    params = {"n": {"bias": np.full(3, 2, np.float32)}}
    arrays = port_to("torch", params, stats)
    np.testing.assert_array_equal(arrays["n.weight"], [1, 1, 1])
    assert "n.weight" not in port_to("torch", {}, stats)  # affine=False
    back, _ = port_from("torch", arrays, (params, stats))
    np.testing.assert_array_equal(back["n"]["bias"], [2, 2, 2])
    arrays["n.weight"][1] = 0.5
    with pytest.raises(UserError, match=r"Not in this network:\s+n\.weight"):
        port_from("torch", arrays, (params, stats))


def test_files_there_and_back(tmp_path):
    file = tmp_path / "new" / "net.safetensors"
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3).T, "count": np.array(7)}
    porting.write(file, arrays)
    found = porting.read(file)
    assert found.keys() == arrays.keys()
    for key, value in arrays.items():
        np.testing.assert_array_equal(found[key], value, strict=True)
    header = b'{"x":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    # The upper half of a float32: 1.5 is 3fc0, -2 is c000.
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes.fromhex("c03f00c0"))
    np.testing.assert_array_equal(porting.read(file)["x"].astype(np.float32), [1.5, -2])


class _Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_other_files_are_refused_and_never_run(tmp_path):
    file, ran = tmp_path / "net", tmp_path / "ran"
    porting.write(file, {"x": np.ones(3)})
    for damaged in (pickle.dumps(_Trap(ran)), file.read_bytes()[:-3], b"\x89HDF\r\n\x1a\n", b""):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="or is damaged"):
            porting.read(file)
    assert not ran.exists()
    with pytest.raises(UserError, match="there is no file"):
        porting.read(tmp_path / "none")
