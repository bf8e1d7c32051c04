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
    return synthetic.restored(folder, synthetic.config(steps=10))[0].params


def cut(content, at, other):
    return content[:at]


def flipped(content, at, other):
    return content[:at] + bytes(byte ^ 1 for byte in content[at : at + 1]) + content[at + 1 :]


def garbage(content, at, other):
    return other


DAMAGE = st.tuples(st.sampled_from(["gone", "folder", cut, flipped, garbage]), st.floats(0, 1))


def damage(file, how, share):
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        file.write_bytes(how(content, int(share * len(content)), str(share).encode()))


@settings(max_examples=100)
@given(data=st.data())
def test_any_damage_to_a_runs_folder_is_said_or_does_no_harm(interrupted, tmp_path, data):
    died, wanted = interrupted
    folder = Path(tempfile.mkdtemp(dir=tmp_path)) / "run"
    shutil.copytree(died, folder)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    for file in data.draw(st.lists(st.sampled_from(sorted(files)), max_size=2, unique=True)):
        damage(file, *data.draw(DAMAGE))
    try:
        synthetic.train(synthetic.config(steps=10), folder)
    except UserError as error:
        assert str(error)
    else:
        jax.tree.map(np.testing.assert_array_equal, parameters(folder), wanted)
