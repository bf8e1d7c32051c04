"""The command `bnjax precise`, on a run of real digits whose averages are not ready."""

import json

import jax
import numpy as np
import pytest

from bnjax.data.batches import evenly_spaced
from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train.loop import train_and_evaluate
from bnjax.train.rundir import read_lines
from bnjax.train.trained import Trained
from bnjax.train_step import eval_step

STEPS, IMAGES, MOMENTUM = 20, 50, 0.99


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "slow"
    config = default_config()
    config.data.name = "digits"
    config.model.update(filters=(8,), kernels=(3,), strides=(2,), dense=(16,), norm_dense=(True,))
    config.model.dropout = (0.0,)
    config.model.momentum = MOMENTUM
    config.train.steps, config.train.batch_size, config.train.shuffle = STEPS, 64, True
    config.eval.every_steps, config.eval.every_epochs = STEPS, 0.0
    config.eval.histograms = config.eval.pictures = config.eval.gap_images = 0
    train_and_evaluate(config, folder, build.dataset(config))
    return folder


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_statistics_are_those_of_the_batch_and_the_run_stays(bnjax, workdir, tmp_path):
    before = contents(workdir)
    words = ("--workdir", workdir, "--images", IMAGES, "--out", tmp_path / "new", "--json")
    code, out, err = bnjax("precise", *words)
    assert code == 0, err
    assert contents(workdir) == before
    result, tested = json.loads(out), read_lines(workdir / "metrics.jsonl")[-1]
    assert (result["step"], result["images"], result["by"]) == (STEPS, IMAGES, "batch")
    for key in ("loss", "accuracy"):
        assert result["stored"][key] == pytest.approx(tested[key], rel=1e-5)
    # Fewer images than a batch: what one step with them would put into the averages.
    run, written = Trained(workdir, "last"), Trained(tmp_path / "new", "last")
    data = run.dataset(None)
    _, after = run.model.apply(
        {"params": run.params, "batch_stats": run.batch_stats},
        evenly_spaced(data.train, IMAGES).image.astype(np.float32) / 255,
        train=True,
        mutable=["batch_stats"],
    )
    true = jax.tree.map(
        lambda old, new: (np.float64(new) - MOMENTUM * np.float64(old)) / (1 - MOMENTUM),
        run.batch_stats,
        after["batch_stats"],
    )
    for mine, its in zip(jax.tree.leaves(written.batch_stats), jax.tree.leaves(true), strict=True):
        # What is divided by 0.01 has a hundred times the rounding of the average.
        np.testing.assert_allclose(mine, its, rtol=1e-3, atol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, written.params, run.params)
    test = {"image": data.test.image, "label": data.test.label}
    means = eval_step(run.params, written.batch_stats, test, model=run.model).means()
    assert result["precise"] == pytest.approx(means, rel=1e-5)
    assert result["precise"]["accuracy"] > result["stored"]["accuracy"] + 0.05


def test_the_table_says_what_was_done(bnjax, workdir):
    words = ("--workdir", workdir, "--images", 150)
    found = {}
    for by in ("batch", "population"):
        code, out, err = bnjax("precise", *words, "--by", by)
        assert code == 0, err
        assert f"checkpoint of step {STEPS}" in out
        assert "of 150 training images" in out
        found[by] = out.splitlines()
    assert found["batch"][2] == found["population"][2]  # the stored ones
    assert found["batch"][3] != found["population"][3]
    assert "batch statistics" in found["batch"][-1]
    assert "the precise statistics" in found["population"][-1]


def test_what_cannot_be_done_is_refused(bnjax, workdir, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for words, said in (
        (("--out", tmp_path / "full"), "exists already"),
        (("--images", 1), "--images"),
        (("--checkpoint", 7), "no checkpoint '7'"),
    ):
        code, _, err = bnjax("precise", "--workdir", workdir, *words)
        assert code != 0
        assert said in err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
