"""The commands as a user runs them, on real digits; most of them in this process."""

import io
import json
import os
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import small_digits
from digit_runs import STEPS
from PIL import Image
from small_digits import CONFIG

from bnjax.train.jsonl import read_lines

ROOT = Path(__file__).parents[1]
SMALL = small_digits.words(model__filters="2,2,2", model__dense="4,4", devices=1)
FEW = [*SMALL, "--config.train.steps", "4", "--config.eval.every_steps=2"]


def test_the_console_script_says_what_there_is(bnjax):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert entry_points(group="console_scripts")["bnjax"].value == scripts["bnjax"]
    code, _, err = bnjax()
    assert code == 2
    assert "COMMAND" in err


class CtrlC(io.StringIO):
    """Standard output that is read by a user who presses Ctrl-C after the second step."""

    def write(self, text):
        if text.startswith("step 2:"):
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


@pytest.mark.lane
def test_a_run_is_stopped_resumed_and_trained_once_for_one_config(bnjax, tmp_path):
    words = ("train", "--config", CONFIG, "--workdir", tmp_path, *FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", CtrlC())
        code, _, err = bnjax(*words)
        out = sys.stdout.getvalue()
    assert code == 130, err
    assert "stopped by SIGINT after step 3" in out
    assert f"bnjax train --config {CONFIG} --workdir {tmp_path}" in out
    code, out, err = bnjax(*words)
    assert code == 0, err
    assert "digits on digits, 4 steps of 128 images" in out
    assert "all 359 test images" in out
    accuracy = json.loads((tmp_path / "summary.json").read_text())["final_train"]["accuracy"]
    assert f"accuracy of the last batch {accuracy:.4f}" in out
    assert f"bnjax audit --workdir {tmp_path}" in out
    assert "\r" not in out + err  # away from a terminal
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4]
    code, out, _ = bnjax(*words)
    assert code == 0
    assert "is finished" in out
    code, _, err = bnjax(*words, "--config.seed=9")
    assert code == 2
    assert "config.seed: 0 there, 9 now" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("trian --config CONFIG", "Did you mean train?"),
        ("train --config CONFIG --config.model.momentun=0.9", "Did you mean config.model.momentum"),
        ("train --config CONFIG --config.model.strides=0,1,1", "strides = (0, 1, 1) is invalid"),
        ("train --config nowhere.py", "there is no config file nowhere.py"),
        (
            "train --config CONFIG --config.data.name=cifar10 --config.data.dir=/nowhere",
            "It must be a folder",
        ),
        (  # three times 4 bytes times 10**12
            "train --config CONFIG --config.model.dense=1000000,1000000",
            "the parameters and the optimizer's state take 11,",
        ),
        ("compare --configs CONFIG,bn --full", "--full needs a claim"),
        ("report", "give at least one folder"),
        ("predict --workdir nowhere x.png", "there is no run in nowhere"),
        ("predict --workdir RUN --checkpoint 77 x.png", "no checkpoint '77'"),
        ("predict --workdir RUN", "give either images or --split"),
        ("predict --model RUN --split test", "need a run"),
        ("audit --workdir RUN --images 3", "8 or above"),
        ("audit --workdir RUN --out RUN/config.json", "config.json"),
        ("precise --workdir RUN --images 1", "2 or above"),
        ("precise --workdir RUN --out RUN", "exists already"),
        ("fold --workdir RUN --out RUN", "exists already"),
        ("port --workdir RUN x --from torch", "--out"),
        ("port --workdir RUN x --to torch --out new", "--to does not"),
        ("port --workdir RUN x", "either --to or --from"),
    ],
)
def test_a_mistake_is_one_paragraph_and_exits_with_2(
    bnjax, healthy, tmp_path, monkeypatch, words, said
):
    monkeypatch.chdir(tmp_path)
    words = words.replace("CONFIG", CONFIG).replace("RUN", str(healthy)).split()
    small = [*SMALL, "--workdir", "new"] if words[0] == "train" else []
    code, out, err = bnjax(words[0], *small, *words[1:])
    assert code == 2
    assert said in err
    assert "Traceback" not in out + err
    # Only a network that is too large is noticed once the run's folder is made.
    assert [*tmp_path.iterdir()] == [tmp_path / "new"] * ("1000000" in words[-1])


@pytest.mark.slow
def test_a_platform_without_a_device_is_one_paragraph(tmp_path):
    words = ["-m", "bnjax.main", "--config", CONFIG, "--workdir", str(tmp_path / "run"), *FEW]
    env = {**os.environ, "JAX_PLATFORMS": "abacus"}
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: JAX has no device for JAX_PLATFORMS=abacus")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_claim_is_tried_and_said_again_without_training(bnjax, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "bnjax.compare.report", raising=False)
    monkeypatch.delattr("bnjax.compare.report", raising=False)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    statement = {"quantity": "test_loss", "at": "last", "of": "slow", "against": "fast"}
    statement |= {"direction": "greater", "margin": 0.1, "source": "me"}
    claim = {
        "question": "Are slow averages bad?",
        "variants": {"fast": (CONFIG, {}), "slow": (CONFIG, {"model.momentum": 0.99})},
        "statements": [statement],
        "seeds": 2,
        "full": {"eval.histograms": 0, "eval.pictures": 0},
    }
    (tmp_path / "claim.py").write_text(f"def get_claim():\n    return {claim!r}\n")
    words = ["compare", "--claim", tmp_path / "claim.py", "--workdir", tmp_path / "runs"]
    words += ["--seeds", 1, *FEW]
    code, first, err = bnjax(*words)
    assert code == 0, err
    assert "Are slow averages bad? (seeds: 1;" in first
    assert "no report: a report needs the package vl_convert" in first
    assert "pip install 'bnjax[report]'" in first
    code, again, err = bnjax(*words)
    assert code == 0, err
    assert "2 of 2 runs are already finished" in again
    assert again.partition("Are slow")[2] == first.partition("Are slow")[2]
    code, _, err = bnjax(*words, "--config.model.epsilon=0.1")
    assert code == 2
    assert "variants.fast.config.model.epsilon: 0.001 there, 0.1 now" in err


def test_a_whole_split_is_predicted_and_agrees_with_the_run(bnjax, healthy):
    _, out, _ = bnjax("predict", "--workdir", healthy, "--split", "test", "--json")
    found, wanted = json.loads(out), json.loads((healthy / "summary.json").read_text())
    assert found["count"] == len(found["predictions"]) == 359
    assert found["step"] == STEPS
    assert found["accuracy"] == wanted["final_test"]["accuracy"]
    assert found["loss"] == pytest.approx(wanted["final_test"]["loss"], rel=1e-5)
    right = [row["class"] == row["label"] for row in found["predictions"]]
    assert np.mean(right) == pytest.approx(found["accuracy"])
    ones = [row["class"] == "one" for row in found["predictions"] if row["label"] == "one"]
    assert found["accuracy_per_class"]["one"] == pytest.approx(np.mean(ones))


def test_images_are_predicted_bad_ones_are_named_and_the_exit_code_is_1(bnjax, healthy, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    Image.fromarray(grey).save(tmp_path / "large.png")
    Image.fromarray(grey[:32, :32]).convert("RGB").save(tmp_path / "right.png")
    np.save(tmp_path / "right.npy", np.repeat(grey[:32, :32, None], 3, axis=2))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff garbage")
    names = ("large.png", "broken.jpg", "right.png", "missing.png", "right.npy")
    files = [tmp_path / name for name in names]
    code, out, err = bnjax("predict", "--workdir", healthy, "--json", *files)
    assert code == 1
    assert "Traceback" not in err
    found = json.loads(out)
    rows = {Path(row["image"]).name: row for row in found["predictions"]}
    assert list(rows) == ["large.png", "right.png", "right.npy"]
    assert "50x40 to 32x32" in rows["large.png"]["note"]
    right = rows["right.png"]
    assert right["scores"] == pytest.approx(rows["right.npy"]["scores"], rel=1e-5)
    assert sum(right["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert right["scores"][right["class"]] == right["score"] == max(right["scores"].values())
    for name, error in zip(("broken.jpg", "missing.png"), found["errors"], strict=True):
        assert name in error
    code, table, _ = bnjax("predict", "--workdir", healthy, tmp_path / "right.png")
    assert code == 0
    assert f"{right['score']:.4f}" in table
