"""Any words on a command line lead to a result or to one paragraph."""

import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import VALUES

from bnjax import errors, main

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
