"""The recipe of configs/speed94.py at a small size: the parts go together, and it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.commands.predict import of_split
from bnjax.data.datasets import Dataset, Split
from bnjax.train import build, parsing
from bnjax.train.loop import train_and_evaluate
from bnjax.train.rundir import read_lines
from bnjax.train.trained import Trained

SMALL = (
    "model.filters=8,12",
    "model.whiten_images=100",
    "model.dtype=float32",
    "train.steps=24",
    "train.batch_size=50",
    "eval.every_epochs=0",
    "eval.every_steps=12",
    "eval.batch_size=30",
    "devices=1",
    # The logits are divided by a width of 12 and not of 256, the losses summed over 50.
    "muon.head_rate=0.05",
    "muon.bias_rate=0.01",
)


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


def config(name="speed94", *more):
    words = [f"--config.{word}" for word in (*SMALL, *more)]
    return parsing.load(f"configs/{name}.py", words)


@pytest.mark.parametrize("name", ["speed94", pytest.param("airbench94", marks=pytest.mark.slow)])
def test_a_small_copy_of_the_recipe_learns(tmp_path, name, monkeypatch):
    more = ("train.epochs=0",) if name == "airbench94" else ()
    summary = train_and_evaluate(config(name, *more), tmp_path, dataset())
    assert summary["final_test"]["accuracy"] > 0.9
    lines = read_lines(tmp_path / "metrics.jsonl")
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    # Smoothed labels: no loss is below the entropy of the target.
    smoothing = 0.2 if name == "airbench94" else 0.09
    target = np.array([1 - smoothing * 2 / 3, smoothing / 3, smoothing / 3])
    assert min(losses) > -(target * np.log(target)).sum() - 1e-6
    assert losses[-1] < losses[0]
    # What was evaluated over several views is predicted so, and one view is something else.
    monkeypatch.setattr(Trained, "dataset", lambda self, data_dir: dataset())
    trained = Trained(tmp_path, "last")
    views, one = (of_split(trained, "test", n)["loss"] for n in (None, 1))
    np.testing.assert_allclose(views, summary["final_test"]["loss"], rtol=1e-4)
    assert abs(views - one) > 1e-4


def test_auto_is_float32_on_a_cpu():
    made = build.experiment(config("speed94", "model.dtype=auto"), dataset())
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assert made.model.dtype == jnp.dtype(fast)
