"""Networks other than the tutorial's: SpeedNet by its recipe at a small size, and a ResNet.

Training, audit, fold and port of each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.clinic import porting
from bnjax.commands.predict import of_split
from bnjax.data.datasets import Dataset, Split
from bnjax.train import build, parsing
from bnjax.train.jsonl import read_lines
from bnjax.train.loop import train_and_evaluate
from bnjax.train.trained import Trained
from bnjax.train_step import predict_step

SMALL = "train.epochs=0 train.steps=24 train.batch_size=50 eval.every_epochs=0 eval.every_steps=12"
SMALL += " eval.batch_size=30 devices=1 model.dtype=float32 "
# The logits are divided by a width of 12 and not of 256, the losses summed over 50.
SPEED = "model.filters=8,12 model.whiten_images=100 muon.head_rate=0.05 muon.bias_rate=0.01"
RESNET = "model.name=resnet20 model.placement=before model.momentum=0.2"
RESNET += " model.mean=0.2,0.2,0.2 model.std=0.3,0.3,0.3"
CONFIGS = {
    "speed94": ("configs/speed94.py", SMALL + SPEED),
    "airbench94": ("configs/airbench94.py", SMALL + SPEED),
    "resnet20": ("bn", SMALL + RESNET),
}


def dataset():
    """Images [n, 16, 16, 3] whose class is where a bright band lies, alike from left and right."""
    rng = np.random.default_rng(0)

    def split(n):
        label = rng.integers(0, 3, n).astype(np.int32)
        image = rng.integers(0, 90, (n, 16, 16, 3), np.uint8)
        for one, of in zip(image, label, strict=True):
            one[of * 4 + 2 : of * 4 + 5] += 110
        return Split(image, label)

    return Dataset("bands", "bands", None, split(400), split(100), ("top", "middle", "bottom"))


DATA = dataset()


def config(name, *more):
    file, words = CONFIGS[name]
    return parsing.load(file, [f"--config.{word}" for word in (*words.split(), *more)])


@pytest.fixture(
    scope="module",
    params=["speed94", *(pytest.param(n, marks=pytest.mark.slow) for n in list(CONFIGS)[1:])],
)
def run(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / request.param
    train_and_evaluate(config(request.param), workdir, DATA)
    return workdir


@pytest.fixture
def command(bnjax, monkeypatch):
    monkeypatch.setattr(Trained, "dataset", lambda self, data_dir: DATA)
    return bnjax


def test_it_learns(run, command):
    lines, trained = read_lines(run / "metrics.jsonl"), Trained(run, "last")
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert losses[-1] < losses[0]
    if run.name == "resnet20":
        return
    assert lines[-1]["accuracy"] > 0.9
    # Smoothed labels: no loss is below the entropy of the target.
    smoothing = trained.config.train.label_smoothing
    target = np.array([1 - smoothing * 2 / 3, smoothing / 3, smoothing / 3])
    assert min(losses) > -(target * np.log(target)).sum() - 1e-6
    # What was evaluated over several views is predicted so, and one view is something else.
    views, one = (of_split(trained, "test", n)["loss"] for n in (None, 1))
    np.testing.assert_allclose(views, lines[-1]["loss"], rtol=1e-4)
    assert abs(views - one) > 1e-4


def scores(one):
    step = jax.jit(predict_step, static_argnames="model")
    return step(one.params, one.batch_stats, DATA.test.image, model=one.model)["score"]


def test_it_is_audited_folded_and_ported_to_torch_and_back(run, command, tmp_path):
    before, folded, file = Trained(run, "last"), tmp_path / "folded", tmp_path / "net.safetensors"
    code, said, _ = command("audit", "--workdir", run)
    assert code in (0, 1)
    assert not any(name in said for name in ("unmatched-leaves", "missing-statistics"))
    code, said, _ = command("fold", "--workdir", run, "--out", folded)
    assert (code, "not folded" in said) == (0, False)
    np.testing.assert_allclose(scores(Trained(folded, "last")), scores(before), atol=1e-4)
    code, said, _ = command("port", "--workdir", run, "--to", "torch", file)
    assert (code, "standardises pixels from 0 to 1: (x - (" in said) == (0, True)
    shapes = {name: array.shape for name, array in porting.read(file).items()}
    if run.name == "resnet20":  # torchvision's names
        assert shapes["layer2.0.conv1.weight"] == (32, 16, 3, 3)
        assert "layer3.2.bn2.running_var" in shapes
    else:
        assert shapes["group0_conv0.weight"] == (8, 24, 3, 3)
    back = ("port", "--workdir", run, "--from", "torch", file, "--out", tmp_path / "new")
    assert command(*back)[0] == 0
    after = Trained(tmp_path / "new", "last")
    mine, its = ((one.params, one.batch_stats) for one in (before, after))
    jax.tree.map(np.testing.assert_array_equal, mine, its)


def test_auto_is_float32_on_a_cpu():
    made = build.experiment(config("speed94", "model.dtype=auto"), DATA)
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assert made.model.dtype == jnp.dtype(fast)
