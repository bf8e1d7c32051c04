"""Logits of exported networks are the network's, in processes without bnjax, or without JAX."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
import safetensors.numpy
from foreign import PreActResNet, ResNet

from bnjax import norms
from bnjax.clinic.folding import difference, plan
from bnjax.clinic.linen import linen
from bnjax.export.onnx import onnx_model
from bnjax.export.stablehlo import named, program
from bnjax.models.convnet import ConvNet
from bnjax.models.layers import with_views
from bnjax.models.speednet import SpeedNet
from bnjax.train_step import forward, init_variables

ROOT = Path(__file__).parents[2]
WITH_JAX, WITHOUT_JAX = re.findall(
    r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL
)
# Runs a script for each folder and file of images; leaves its logits beside the images.
RUNNER = """
import contextlib, io, json, runpy, sys
import numpy as np
script, banned, jobs = sys.argv[1], sys.argv[2].split(","), json.loads(sys.argv[3])
for folder, images, out in jobs:
    sys.argv = [script, folder, images]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        logits = np.asarray(runpy.run_path(script)["logits"])
    np.savez(out, logits=logits, printed=printed.getvalue())
print([name for name in banned if name in sys.modules])
"""
SHAPE, SIZE = (12, 12, 3), 7
# Any number of images: a program is compiled for each, so that few networks are tried with others.
OTHER_SIZES = {"batch": (1, 32), "speednet, six views": (1, 32)}
SMALL = {"filters": (4,), "kernels": (3,), "strides": (2,), "dense": (5,), "dropout": (0.0,)}
net = partial(ConvNet, **SMALL, norm_dense=(True,))
batch, group = norms.build("batch"), norms.build("group", groups=1)
before, after = (partial(net, placement=place) for place in ("before", "after"))
conv_only, speednet = partial(before, norm_dense=(False,)), partial(SpeedNet, widths=(4,))
# Of each what it is, and how many of its norms are folded; None: no folding is asked for.
NETWORKS = {
    "batch": (net(norm=batch), 3),
    "before, max, gelu": (before(norm=batch, pooling="max", activation=nn.gelu), 2),
    "frn": (conv_only(norm=norms.build("frn"), norm_activation=norms.ThresholdedLinear), None),
    "speednet, six views": (with_views(speednet(norm=batch), 6), None),
    "residual, padded as by torch": (ResNet((1, 1), 4, torchvision=True), None),
    "residual, norms first": (PreActResNet(1, 4), 1),
    "after, avg, group, elu": (after(norm=group, pooling="avg", activation=nn.elu), None),
}


def network(model):
    """Returns weights and statistics that training might have left: none are 0 or 1."""
    rng = np.random.default_rng(0)
    init = partial(init_variables, model, jax.random.key(0))
    params, batch_stats = jax.eval_shape(init, np.zeros((1, *SHAPE), np.uint8))

    def weight(path, leaf):
        drawn = rng.normal(0, 0.3, leaf.shape) + (path[-1].key == "scale")
        return drawn.astype(np.float32)

    def statistic(leaf):
        return rng.uniform(0.1, 1.2, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(weight, params), jax.tree.map(statistic, batch_stats)


@pytest.fixture
def expected(tmp_path_factory):
    """The folder of each network, images, and its logits."""
    images = np.random.default_rng(1).integers(0, 256, (32, *SHAPE), np.uint8)
    found = {}
    for name, (model, count) in NETWORKS.items():
        variables = network(model)
        # In evaluation those of an image depend on no other.
        own, _ = jax.jit(partial(forward, model=model, train=False))(*variables, {"image": images})
        folder, exported = tmp_path_factory.mktemp("model"), model
        if count is not None:
            folded, norms = plan(linen(model, *variables), images[:1])
            assert sum(one.layer is not None for one in norms) == count, norms
            exported, variables = folded.model, (folded.params, folded.batch_stats)
        (folder / "model.stablehlo").write_bytes(program(exported, *variables, SHAPE, ["cpu"]))
        safetensors.numpy.save_file(named(*variables), folder / "weights.safetensors")
        made = onnx_model(exported, *variables, SHAPE)
        (folder / "model.onnx").write_bytes(made.SerializeToString())
        (folder / "manifest.json").write_text(json.dumps({"classes": [*"abcdefghij"]}))
        found[name] = folder, images, own
    return found


def run_outside(script, banned, jobs, tmp_path):
    """Returns logits, and what was printed, for each of `jobs` (folder, images), from one process.

    `banned` are the modules that it must not have imported in the end.
    """
    (tmp_path / "script.py").write_text(script)
    tasks = []
    for number, (folder, images) in enumerate(jobs):
        np.save(tmp_path / f"{number}.npy", images)
        tasks.append([str(folder), str(tmp_path / f"{number}.npy"), str(tmp_path / f"{number}")])
    # Where it starts there is no bnjax; it may be installed, and must not be used.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [sys.executable, "-c", RUNNER, tmp_path / "script.py", banned, json.dumps(tasks)]
    done = subprocess.run(
        words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"  # none of the banned modules
    found = [np.load(f"{out}.npz") for _, _, out in tasks]
    return [(one["logits"], str(one["printed"])) for one in found]


SCRIPTS = ((WITH_JAX, "bnjax,flax"), (WITHOUT_JAX, "bnjax,flax,jax,jaxlib,onnx"))


def test_logits_are_the_networks(expected, tmp_path):
    named = [(name, n) for name in expected for n in (SIZE, *OTHER_SIZES.get(name, ()))]
    jobs = [(expected[name][0], expected[name][1][:size]) for name, size in named]
    for script, banned in SCRIPTS:
        found = run_outside(script, banned, jobs, tmp_path)
        for (name, size), (logits, printed) in zip(named, found, strict=True):
            assert (logits.shape, logits.dtype) == ((size, 10), np.float32), name
            assert difference(logits, expected[name][2][:size]) < 1e-4, name
            # They differ from image to image by more than the bound.
            differs = np.ptp(logits, axis=0).max() > 1e-3 * np.abs(logits).max()
            assert size == 1 or differs, name
            assert printed == f"{['abcdefghij'[index] for index in logits.argmax(-1)]}\n", name
