"""Whatever is thrown at bnjax, the answer is a result or one paragraph."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bnjax import errors, main
from bnjax.errors import UserError
from bnjax.train import build
from bnjax.train.checkpoint import Checkpoints
from bnjax.train_step import init_variables

ROOT = Path(__file__).parents[2]


NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.integers(),
    st.floats(),
    st.sampled_from([0.0, 1.0, 1e-320, 1e308, 10**30]),
)
VALUES = st.one_of(
    NUMBERS.map(str),
    st.lists(NUMBERS, max_size=4).map(lambda values: ",".join(map(str, values))),
    st.sampled_from(
        [
            "True",
            "none",
            "",
            "()",
            "(1,)",
            "[[1]]",
            "{}",
            "{1: 2}",
            "'a'",
            "1_000",
            "0x10",
            "batch",
            "sgd",
            "digits",
            "max",
            "before",
        ]
    ),
    st.text(max_size=20),
)
SMALL = synthetic.dataset()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    synthetic.train(synthetic.config(steps=5), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("module", ["train", "predict", "compare", "report"])
@settings(max_examples=24)
@given(data=st.data())
def test_any_words_on_a_command_line(finished, tmp_path, module, data):
    own = {
        "train": ["--config"],
        "predict": ["--split", "--json", "--checkpoint", "--data-dir"],
        "compare": ["--configs", "--claim", "--full", "--seeds"],
        "report": ["--out"],
    }
    flag = st.sampled_from(
        [*own[module], "--workdir", "--help", "--config.seed", "--config.data.name=digits"]
    )
    words = st.one_of(
        flag,
        st.sampled_from(
            [str(finished), str(ROOT / "configs" / "digits.py"), str(ROOT), "/dev/null", "test"]
        ),
        VALUES,
    )
    arguments = [
        word.replace("\0", "").encode("utf-8", "ignore").decode()
        for word in data.draw(st.lists(words, max_size=5))
    ]
    trains = module in ("train", "compare")
    few = (
        ["--config.train.steps=1", "--config.train.epochs=0", "--workdir", str(tmp_path / "new")]
        if trains
        else []
    )
    command = [sys.executable, "-m", "bnjax.main", module, *arguments, *few]
    env = {**os.environ, "XLA_FLAGS": "", "BNJAX_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode in (0, 1, 2), done
    assert "Traceback" not in done.stderr, done


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that died in step 8 of 10, and the parameters of one that did not."""
    folder, config = tmp_path_factory.mktemp("runs"), synthetic.config(steps=10)
    synthetic.train(config, folder / "whole")
    with pytest.raises(StopIteration):
        synthetic.train(config, folder / "died", first=7)
    return folder / "died", parameters(folder / "whole")


def parameters(folder):
    experiment = build.experiment(synthetic.config(steps=10), SMALL)
    like = jax.eval_shape(
        lambda: init_variables(experiment.model, jax.random.key(0), SMALL.train.image[:1])
    )
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return jax.device_get(checkpoints.restore_variables(checkpoints.step("last"), like))


DAMAGE = st.one_of(
    st.just("gone"),
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("garbage"), st.binary(max_size=50)),
    st.tuples(st.just("flipped"), st.floats(0, 1)),
    st.just("folder"),
)


def damage(file, how):
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        kind, amount = how
        if kind == "flipped" and content:
            position = int(amount * (len(content) - 1))
            content = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        file.write_bytes(
            amount
            if kind == "garbage"
            else content[: int(amount * len(content))]
            if kind == "cut"
            else content
        )


@pytest.mark.slow
@settings(max_examples=100)
@given(data=st.data())
def test_any_damage_to_a_runs_folder_is_said_or_does_no_harm(interrupted, tmp_path, data):
    died, wanted = interrupted
    folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
    shutil.copytree(died, folder)
    files = sorted(
        path.relative_to(folder)
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    )
    for name in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
        damage(folder / name, data.draw(DAMAGE))
    try:
        synthetic.train(synthetic.config(steps=10), folder)
    except UserError as error:
        assert str(error)
    else:
        jax.tree.map(np.testing.assert_array_equal, parameters(folder), wanted)


@pytest.mark.slow
@settings(max_examples=100)
@given(data=st.data())
def test_any_damage_is_said_or_does_no_harm_when_predicting(finished, tmp_path, capsys, data):
    """The command line itself: damaged runs, and images of damaged or random bytes."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
    shutil.copytree(finished, folder)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    if data.draw(st.booleans()):
        damage(folder / data.draw(st.sampled_from(files)), data.draw(DAMAGE))
    images = []
    for number, kind in enumerate(
        data.draw(
            st.lists(
                st.sampled_from(["png", "jpeg", "npy", "gif", "bytes", "none"]),
                min_size=1,
                max_size=3,
            )
        )
    ):
        file = folder.parent / f"{number}.{'png' if kind in ('bytes', 'none') else kind}"
        if kind == "bytes":
            file.write_bytes(data.draw(st.binary(max_size=60)))
        elif kind == "npy":
            np.save(
                file,
                np.zeros(
                    data.draw(st.lists(st.integers(0, 9), max_size=4)),
                    data.draw(st.sampled_from(["u1", "f4", "i8", "?"])),
                ),
            )
        elif kind != "none":
            Image.fromarray(np.zeros((9, 9), np.uint8)).save(file)
        if kind not in ("bytes", "none") and data.draw(st.booleans()):
            damage(file, data.draw(DAMAGE))
        images.append(str(file))
    words = ["predict", "--workdir", str(folder), *images]
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: main.main(words))
    assert ended.value.code in (0, 1, 2)
    assert ended.value.code == 0 or "error: " in capsys.readouterr().err
