"""The command `bnjax audit`, on runs of real digits."""

import json
import re
import shutil

import pytest

from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train.loop import train_and_evaluate
from bnjax.train.trained import Trained

STEPS = 40


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs, of 0.5 and of 0.99 as momentum."""
    folder = tmp_path_factory.mktemp("runs")
    for momentum in (0.5, 0.99):
        train(folder / str(momentum), STEPS, momentum=momentum, placement="before")
    return folder


def train(workdir, steps, **model):
    config = default_config()
    config.data.name = "digits"
    config.model.update(filters=(8,), kernels=(3,), strides=(2,), dense=(16,), norm_dense=(True,))
    config.model.update(dropout=(0.0,), **model)
    config.train.steps, config.train.batch_size, config.train.shuffle = steps, 64, True
    config.eval.every_steps, config.eval.every_epochs = steps // 2, 0.0
    config.eval.histograms = config.eval.pictures = config.eval.gap_images = 0
    train_and_evaluate(config, workdir, build.dataset(config))


def test_a_healthy_run_exits_with_0(bnjax, runs):
    code, out, _ = bnjax("audit", "--workdir", runs / "0.5", "--images", 512)
    assert code == 0, out
    assert f"checkpoint of step {STEPS}, digits" in out
    assert "healthy: nothing found" in out
    assert "not checked" not in out  # a run's folder knows everything


def test_an_ill_run_exits_with_1_and_says_how_to_mend_it(bnjax, runs, tmp_path):
    arguments = ("audit", "--workdir", runs / "0.99", "--images", 512)
    code, out, error = bnjax(*arguments, "--json", "--out", tmp_path)
    assert code == 1
    content = json.loads(out)
    assert [one["id"] for one in content["findings"]] == ["not-converged"]
    assert (content["step"], content["dataset"], content["examples"]) == (STEPS, "digits", 512)
    assert f"{0.99**STEPS:.1%}" in content["findings"][0]["measured"]
    page = (tmp_path / "audit.html").read_text()
    assert str(tmp_path / "audit.html") in error
    for layer in content["layers"]:
        assert layer["name"] in page
    assert "not-converged: the averages still remember" in page
    assert not re.findall(r"""(?:src|href)=["']https?:""", page)  # needs no network


def test_a_checkpoint_says_which_weights_its_statistics_belong_to(bnjax, runs, tmp_path):
    trained = Trained(runs / "0.5", "last")

    # The record of another step: as if the weights had been replaced.
    copy = shutil.copytree(runs / "0.5", tmp_path / "copy")
    record = copy / "checkpoints" / str(STEPS) / "bnjax.json"
    content = json.loads(record.read_text())
    assert content["about"]["weights"] == trained.weights
    content["about"]["weights"] = Trained(runs / "0.5", str(STEPS // 2)).weights
    record.write_text(json.dumps(content))
    found = json.loads(bnjax("audit", "--workdir", copy, "--images", 256, "--json")[1])
    assert [one["id"] for one in found["findings"]] == ["stale"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--workdir", "nowhere"), "there is no run in nowhere"),
        (("--workdir", "0.5", "--checkpoint", "3"), "there is no checkpoint '3'"),
        (("--workdir", "0.5", "--images", "3"), "8 or above"),
        (("--workdir", "0.5", "--images", "64", "--out", "0.5/config.json"), "config.json"),
    ],
)
def test_unusable_input_exits_with_2(bnjax, runs, monkeypatch, arguments, words):
    monkeypatch.chdir(runs)
    code, out, error = bnjax("audit", *arguments)
    assert code == 2
    assert out == ""  # before anything is measured
    assert words in error


def test_a_run_without_batch_norm_is_not_called_healthy(bnjax, tmp_path):
    train(tmp_path, 2, norm="none")
    code, out, _ = bnjax("audit", "--workdir", tmp_path)
    assert code == 2, out
    assert "all other checks: a batch norm of Flax or bnjax in the model" in out
    assert "healthy" not in out
