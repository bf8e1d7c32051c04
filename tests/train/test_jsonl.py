"""The files of a run: written whole, read plainly, and a damaged one is one sentence."""

import subprocess

import pytest
from events import read_values

from bnjax.errors import UserError
from bnjax.train import rundir, summary
from bnjax.train.jsonl import Lines, RunWriter, read_lines


def test_a_torn_last_line_is_left_out_and_later_steps_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [line["step"] for line in read_lines(file)] == [1, 2, 3]
    lines = Lines(file, keep_up_to=2)
    lines.write({"step": 3, "again": True})
    lines.close()
    assert read_lines(file) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_tensorboard_gets_every_scalar(tmp_path):
    with RunWriter(tmp_path, start=0) as writer:
        writer.metrics(1, "train", {"loss": 2.0, "accuracy": 0.25})
        writer.metrics(1, "test", {"loss": 3.0, "accuracy": 0.5, "count": 4})
        writer.timing(1, 0.5, 100.0)
    found = {
        tag: (step, value.simple_value)
        for tag, [(step, value)] in read_values(tmp_path / "tensorboard").items()
    }
    assert found["train/loss"] == (1, 2.0)
    assert found["test/accuracy"] == (1, 0.5)
    assert found["train/images_per_s"] == (1, 100.0)


@pytest.mark.parametrize("content", ["{\n", '{"loss": 1.0}\n', "\x80\n"])
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    for name, read in (("metrics.jsonl", read_lines), ("config.json", None)):
        file = tmp_path / name
        file.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            read(file) if read else rundir.read(tmp_path)


def git(folder, *words):
    name = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", str(folder), *name, *words], check=True, capture_output=True)


def test_the_revision_is_that_of_a_repository_which_tracks_the_package(tmp_path):
    git(tmp_path, "init")
    for name in ("bnjax", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "other")
    assert summary._git_revision(tmp_path / "bnjax") is None
    git(tmp_path, "add", "bnjax")
    git(tmp_path, "commit", "-m", "own")
    assert summary._git_revision(tmp_path / "bnjax")
    assert summary._git_revision(tmp_path / "nowhere") is None
