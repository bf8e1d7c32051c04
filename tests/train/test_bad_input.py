"""Any words on a command line and any damage to files lead to a result or to one paragraph."""

import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import VALUES

from bnjax import errors, main
from bnjax.errors import UserError
from bnjax.train import build
from bnjax.train.checkpoint import Checkpoints
from bnjax.train_step import init_variables

pytestmark = pytest.mark.slow
OWN = {
    "train": ["--config"],
    "predict": ["--split", "--json", "--checkpoint", "--data-dir"],
    "compare": ["--configs", "--claim", "--full", "--seeds"],
    "report": ["--out"],
}


def exit_code(*words):
    with pytest.raises(SystemExit) as ended:
        errors.run(lambda: main.main([*map(str, words)]))
    return ended.value.code or 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    synthetic.train(synthetic.config(steps=5), folder)
    return folder


@pytest.mark.parametrize("command", OWN)
@settings(max_examples=24)
@given(data=st.data())
def test_any_words_on_a_command_line(finished, tmp_path, monkeypatch, capsys, command, data):
    monkeypatch.chdir(tmp_path)
    own = st.sampled_from([*OWN[command], "--workdir", "--help", "--config.seed"])
    files = st.sampled_from([str(finished), "digits", "/dev/null", "test", str(tmp_path)])
    arguments = data.draw(st.lists(own | files | VALUES, max_size=5))
    few = ["--config.data.name=digits", "--config.train.steps=1", "--workdir", str(tmp_path / "a")]
    code = exit_code(command, *arguments, *few * (command in ("train", "compare")))
    said = capsys.readouterr().err
    assert code in (0, 1, 2), said
    assert "Traceback" not in said


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that died in step 8 of 10, and the parameters of one that did not."""
    folder, config = tmp_path_factory.mktemp("runs"), synthetic.config(steps=10)
    synthetic.train(config, folder / "whole")
    with pytest.raises(StopIteration):
        synthetic.train(config, folder / "died", first=7)
    return folder / "died", parameters(folder / "whole")


def parameters(folder):
    data = synthetic.dataset()
    model = build.experiment(synthetic.config(steps=10), data).model
    images = data.train.image[:1]
    like = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), images))
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return jax.device_get(checkpoints.restore_variables(checkpoints.step("last"), like))


DAMAGE = st.one_of(
    st.sampled_from(["gone", "folder"]),
    st.tuples(st.sampled_from(["cut", "flipped"]), st.floats(0, 1)),
    st.tuples(st.just("garbage"), st.binary(max_size=50)),
)


def damage(file, how):
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        kind, amount = how
        if kind == "cut":
            content = content[: int(amount * len(content))]
        elif kind == "garbage":
            content = amount
        elif content:
            at = int(amount * (len(content) - 1))
            content = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        file.write_bytes(content)


@settings(max_examples=100)
@given(data=st.data())
def test_any_damage_to_a_runs_folder_is_said_or_does_no_harm(interrupted, tmp_path, data):
    died, wanted = interrupted
    folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
    shutil.copytree(died, folder)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    for file in data.draw(st.lists(st.sampled_from(sorted(files)), max_size=2, unique=True)):
        damage(file, data.draw(DAMAGE))
    try:
        synthetic.train(synthetic.config(steps=10), folder)
    except UserError as error:
        assert str(error)
    else:
        jax.tree.map(np.testing.assert_array_equal, parameters(folder), wanted)
