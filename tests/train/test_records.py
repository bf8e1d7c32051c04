import gc

import pytest
from events import read_values

from bnjax.errors import UserError
from bnjax.train.rundir import Lines, RunWriter, read_lines, write_json


def test_a_torn_last_line_is_left_out_and_later_steps_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [line["step"] for line in read_lines(file)] == [1, 2, 3]
    lines = Lines(file, keep_up_to=2)
    lines.write({"step": 3, "again": True})
    lines.close()
    assert read_lines(file) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    write_json(tmp_path / "a.json", {"a": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_tensorboard_gets_every_scalar(tmp_path):
    with RunWriter(tmp_path, start=0) as writer:
        writer.train(1, {"loss": 2.0, "accuracy": 0.25}, skipped=False)
        writer.test(1, {"loss": 3.0, "accuracy": 0.5}, count=4)
        writer.timing(1, 0.5, 100.0)
    found = {
        tag: (step, value.simple_value)
        for tag, [(step, value)] in read_values(tmp_path / "tensorboard").items()
    }
    assert found["train/loss"] == (1, 2.0)
    assert found["test/accuracy"] == (1, 0.5)
    assert found["train/images_per_s"] == (1, 100.0)


@pytest.mark.parametrize("name", ["timing.jsonl", "histograms.jsonl", "tensorboard"])
def test_where_one_file_cannot_be_opened_none_stays_open(tmp_path, name):
    if name == "tensorboard":
        (tmp_path / name).write_text("no folder")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises((OSError, UserError)):
        RunWriter(tmp_path, start=0)
    gc.collect()  # pytest makes an error of a file that is open when nothing refers to it
