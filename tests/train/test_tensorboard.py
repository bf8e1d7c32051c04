"""What a run leaves in histograms.jsonl and tensorboard/, read back."""

import io

import numpy as np
import pytest
import synthetic
from events import read_events, read_values
from PIL import Image
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from bnjax.train import build, parsing
from bnjax.train.graph import graph_def
from bnjax.train.rundir import read_lines
from bnjax.train.tensorboard import CAPTION, TILE, Board


def watched():
    config = synthetic.config()
    config.eval.histograms, config.eval.pictures = 256, 12
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    synthetic.train(watched(), folder)
    return folder


@pytest.fixture(scope="module")
def values(finished):
    return read_values(finished / "tensorboard")


def test_each_evaluation_leaves_its_histograms_once(finished):
    lines = read_lines(finished / "histograms.jsonl")
    assert [line["step"] for line in lines] == [5, 10, 12]
    layers = ["conv0", "dense0", "logits"]
    assert [*lines[0]["activation"]] == [name for of in layers for name in (f"{of}_norm", of)]
    statistics = [f"{of}_norm.{leaf}" for of in layers for leaf in ("mean", "var")]
    assert [*lines[0]["statistic"]] == statistics


def test_looking_changes_no_training(finished, tmp_path):
    config = synthetic.config()
    synthetic.train(config, tmp_path / "unseen")
    unseen, seen = (folder / "metrics.jsonl" for folder in (tmp_path / "unseen", finished))
    assert unseen.read_bytes() == seen.read_bytes()
    assert (tmp_path / "unseen" / "histograms.jsonl").read_bytes() == b""
    assert "test/predictions" not in read_values(tmp_path / "unseen" / "tensorboard")


def test_a_run_that_died_and_goes_on_has_every_histogram_once(finished, tmp_path):
    with pytest.raises(StopIteration):
        synthetic.train(watched(), tmp_path / "run", first=7)
    assert "_hparams_/session_end_info" not in read_values(tmp_path / "run" / "tensorboard")
    with (tmp_path / "run" / "histograms.jsonl").open("a") as file:
        file.write('{"step": 7, "activation": {}}\n{"step": 8, "sta')  # past the checkpoint; torn
    synthetic.train(watched(), tmp_path / "run")
    again = (tmp_path / "run" / "histograms.jsonl").read_bytes()
    assert again == (finished / "histograms.jsonl").read_bytes()
    events = read_events(tmp_path / "run" / "tensorboard")
    assert sum(bool(event.graph_def) for event in events) == 1


def test_tensorboard_gets_the_same_histograms(finished, values):
    numbers = read_lines(finished / "histograms.jsonl")[1]["gradient"]["dense0.kernel"]
    step, value = values["gradient/dense0.kernel"][1]
    assert step == 10
    # An empty bin stands before the first.
    assert value.histo.bucket[1:] == numbers["counts"]
    limits = np.linspace(numbers["low"], numbers["high"], len(numbers["counts"]) + 1)
    np.testing.assert_allclose(value.histo.bucket_limit, limits)


def test_tensorboard_gets_the_graph_of_the_model(finished):
    (event,) = (event for event in read_events(finished / "tensorboard") if event.graph_def)
    model = build.experiment(watched(), synthetic.dataset()).model
    graph = GraphDef.FromString(event.graph_def)
    assert graph == graph_def(model, (10, 8, 8, 1))


def test_tensorboard_gets_the_hyperparameters_in_the_same_run(values):
    content = {
        tag.rpartition("/")[2]: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for tag, found in values.items()
        for _, value in found
        if tag.startswith("_hparams_")
    }
    assert set(content) == {"experiment", "session_start_info", "session_end_info"}
    hparams = content["session_start_info"].session_start_info.hparams
    assert hparams["model.momentum"].number_value == 0.75
    assert hparams["model.norm"].string_value == "batch"
    assert hparams["train.shuffle"].bool_value is True
    assert set(hparams) == set(parsing.flat(watched().to_dict()))
    compared = {metric.name.tag for metric in content["experiment"].experiment.metric_infos}
    assert compared <= set(values)
    first = content["experiment"].experiment.hparam_infos[0].name
    assert first == "data.name"  # the first that is not as in the defaults


def test_tensorboard_gets_test_images_with_predictions(values):
    assert [step for step, _ in values["test/predictions"]] == [5, 10, 12]
    sheet = Image.open(io.BytesIO(values["test/predictions"][0][1].image.encoded_image_string))
    assert sheet.size == (4 * TILE, 3 * (TILE + CAPTION))
    tiles = np.asarray(sheet).reshape(3, TILE + CAPTION, 4, TILE, 3).swapaxes(1, 2)
    for tile, image in zip(tiles.reshape(12, -1, TILE, 3), range(12), strict=True):
        # The middle of each pixel of an 8x8 image, 15 by 15 on the sheet.
        middles = tile[11:124:15, 11:124:15]
        np.testing.assert_array_equal(
            middles, synthetic.dataset().test.image[image * 20 // 12].repeat(3, axis=-1)
        )
        assert (tile[TILE:] < 100).any()  # the caption


def test_a_second_part_of_a_run_hides_what_comes_again(tmp_path):
    for start in (0, 3):
        board = Board(tmp_path, start=start)
        board.scalar("train/loss", 1.0, start + 1)
        board.close()
    assert [event.step for event in read_events(tmp_path) if event.HasField("session_log")] == [4]
