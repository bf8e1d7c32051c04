"""The commands as a user runs them, on real digits; most of them in this process."""

import contextlib
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
from PIL import Image

from bnjax import errors, main
from bnjax.train.config import KEYS

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "digits.py")
SMALL = small_digits.words(model__filters="2,2,2", model__dense="4,4", devices=1)
FEW = [*SMALL, "--config.train.steps=4", "--config.eval.every_steps=2"]

ENV = {
    **os.environ,
    "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    "PYTHONWARNINGS": "default",
}  # one device, compiled quickly


def bnjax(*arguments):
    """Runs a command as a process."""
    command = [sys.executable, "-m", "bnjax.main", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env=ENV, timeout=240, check=False
    )


def inside(*arguments):
    """Runs a command in this process, which takes a fraction of the time."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as left,
    ):
        errors.run(lambda: main.main([*map(str, arguments)]))
    return subprocess.CompletedProcess(
        arguments, left.value.code or 0, out.getvalue(), err.getvalue()
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run in a folder, and what the command printed."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    done = inside("--config", CONFIG, "--workdir", workdir, *FEW)
    assert done.returncode == 0, done.stderr
    return workdir, done


@pytest.mark.parametrize("command", [*main.COMMANDS])
def test_help_exits_with_0(command):
    done = inside(command, "--help")
    assert done.returncode == 0
    assert {"report": "--out", "info": "--json"}.get(command, "--workdir") in done.stdout
    for key in KEYS if command in ("train", "compare") else ():
        assert f"--config.{key.name}=" in done.stdout
    assert f"    {command:9}" in inside("--help").stdout


def test_the_console_script_says_what_there_is():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert entry_points(group="console_scripts")["bnjax"].value == scripts["bnjax"]
    done = bnjax()
    assert done.returncode == 2
    assert "COMMAND" in done.stderr


@pytest.mark.lane
def test_training_prints_plain_lines_away_from_a_terminal(run):
    _, done = run
    assert "digits on digits, 4 steps of 128 images" in done.stdout
    assert "all 359 test images" in done.stdout
    assert "\r" not in done.stdout + done.stderr


def test_a_finished_run_says_so(run):
    workdir, _ = run
    again = inside("train", "--config", CONFIG, "--workdir", workdir, *FEW)
    assert again.returncode == 0
    assert "is finished" in again.stdout


def test_another_config_in_the_same_folder_is_refused(run):
    workdir, _ = run
    other = inside("train", "--config", CONFIG, "--workdir", workdir, *FEW, "--config.seed=9")
    assert other.returncode == 2
    assert "config.seed: 0 there, 9 now" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--config", CONFIG, "--config.model.momentun=0.9"],
            "Did you mean config.model.momentum?",
        ),
        (
            ["--config", CONFIG, "--config.model.strides=0,1,1"],
            "config.model.strides = (0, 1, 1) is invalid",
        ),
        (["--config", "nowhere.py"], "there is no config file nowhere.py"),
        (
            ["--config", CONFIG, "--config.data.name=cifar10", "--config.data.dir=/nowhere"],
            "It has to be a folder",
        ),
    ],
)
def test_mistakes_are_one_paragraph_and_exit_with_2(tmp_path, arguments, said):
    done = inside("train", *arguments, "--workdir", tmp_path / "run")
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "--config", CONFIG], "Did you mean train?"),
        (["compare", "--configs", f"{CONFIG},bn", "--full"], "--full needs a claim"),
    ],
)
def test_mistaken_commands_say_what_there_is(words, said):
    done = inside(*words)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_network_that_fits_into_no_memory_is_one_paragraph(tmp_path):
    done = inside(
        "train",
        "--config",
        CONFIG,
        "--workdir",
        tmp_path / "run",
        *FEW,
        "--config.model.dense=1000000,1000000",
    )
    assert done.returncode == 2
    assert (
        "the parameters and the optimizer's state take 11," in done.stderr
    )  # three times 4 bytes times 10**12
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_platform_without_a_device_is_one_paragraph(tmp_path, monkeypatch):
    monkeypatch.setitem(ENV, "JAX_PLATFORMS", "abacus")
    done = bnjax("--config", CONFIG, "--workdir", tmp_path / "run", *FEW)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: JAX has no device for JAX_PLATFORMS=abacus")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    steps = [
        "--config.train.steps=80",
        "--config.eval.every_steps=20",
    ]
    arguments = ["--config", CONFIG, "--workdir", str(tmp_path / "run"), *SMALL, *steps]
    command = [sys.executable, "-m", "bnjax.main", "train", *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
    ) as process:
        assert process.stdout is not None
        while "step 20:" not in process.stdout.readline():  # in the middle of training
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopped by SIGINT after step" in out
    assert f"--workdir {tmp_path / 'run'}" in out
    assert "Traceback" not in err
    done = bnjax("train", *arguments)
    assert done.returncode == 0, done.stderr
    steps = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in steps if line["split"] == "train"] == list(range(1, 81))


def test_a_claim_is_tried_and_said_again_without_training(tmp_path):
    statement = {
        "quantity": "test_loss",
        "at": "last",
        "of": "slow",
        "against": "fast",
        "direction": "greater",
        "margin": 0.1,
        "source": "me",
    }
    claim = {
        "question": "Are slow averages bad?",
        "variants": {"fast": (CONFIG, {}), "slow": (CONFIG, {"model.momentum": 0.99})},
        "statements": [statement],
        "seeds": 2,
        "full": {"eval.histograms": 0, "eval.pictures": 0},
    }
    (tmp_path / "claim.py").write_text(f"def get_claim():\n    return {claim!r}\n")
    command = ["compare", "--claim", tmp_path / "claim.py", "--workdir", tmp_path / "runs", *FEW]
    done = inside(*command)
    assert done.returncode == 0, done.stderr
    assert "Are slow averages bad? (seeds: 2;" in done.stdout
    assert "\r" not in done.stdout + done.stderr
    again = inside(*command)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 runs are already finished" in again.stdout
    assert again.stdout.partition("Are slow")[2] == done.stdout.partition("Are slow")[2]
    other = inside(*command, "--config.model.epsilon=0.1")
    assert other.returncode == 2
    assert "variants.fast.config.model.epsilon: 0.001 there, 0.1 now" in other.stderr
    assert "Traceback" not in other.stderr


def test_a_whole_split_is_predicted_and_agrees_with_the_run(run):
    workdir, _ = run
    found = json.loads(inside("predict", "--workdir", workdir, "--split", "test", "--json").stdout)
    summary = json.loads((workdir / "summary.json").read_text())
    assert found["count"] == len(found["predictions"]) == 359
    assert found["accuracy"] == summary["final_test"]["accuracy"]
    assert found["loss"] == pytest.approx(summary["final_test"]["loss"], rel=1e-5)
    right = [row["class"] == row["label"] for row in found["predictions"]]
    assert np.mean(right) == pytest.approx(found["accuracy"])
    ones = [row["class"] == "one" for row in found["predictions"] if row["label"] == "one"]
    assert found["accuracy_per_class"]["one"] == pytest.approx(np.mean(ones))


def test_images_are_predicted_bad_ones_are_named_and_the_exit_code_is_1(run, tmp_path):
    workdir, _ = run
    grey = np.random.default_rng(0).integers(0, 256, (40, 50), np.uint8)
    Image.fromarray(grey).save(tmp_path / "large.png")
    Image.fromarray(grey[:32, :32]).convert("RGB").save(tmp_path / "right.png")
    np.save(tmp_path / "right.npy", np.repeat(grey[:32, :32, None], 3, axis=2))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff garbage")
    names = ["large.png", "broken.jpg", "right.png", "missing.png", "right.npy"]
    done = inside("predict", "--workdir", workdir, "--json", *(tmp_path / name for name in names))
    assert done.returncode == 1
    found = json.loads(done.stdout)
    rows = {Path(row["image"]).name: row for row in found["predictions"]}
    assert list(rows) == ["large.png", "right.png", "right.npy"]
    assert "50x40 to 32x32" in rows["large.png"]["note"]
    assert rows["right.png"]["scores"] == pytest.approx(rows["right.npy"]["scores"], rel=1e-5)
    assert sum(rows["right.png"]["scores"].values()) == pytest.approx(1, abs=1e-5)
    assert rows["right.png"]["score"] == max(rows["right.png"]["scores"].values())
    assert [
        name in error
        for name, error in zip(("broken.jpg", "missing.png"), found["errors"], strict=True)
    ] == [True, True]
    assert "Traceback" not in done.stderr
    table = inside("predict", "--workdir", workdir, tmp_path / "right.png")
    assert table.returncode == 0
    assert f"{rows['right.png']['score']:.4f}" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workdir", "nowhere", "x.png"], "there is no run in nowhere"),
        (["--workdir", "RUN", "--checkpoint", "77", "x.png"], "no checkpoint '77'"),
        (["--workdir", "RUN"], "give either images or --split"),
        (["--model", "RUN", "--split", "test"], "need a run"),
    ],
)
def test_predict_says_what_is_missing(run, arguments, said):
    done = inside("predict", *(run[0] if argument == "RUN" else argument for argument in arguments))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
