"""What is observed in a run: gap, drift, histograms; and all of it in TensorBoard, read back."""

import functools
import io

import jax
import numpy as np
import pytest
import synthetic
from events import read_events, read_values
from PIL import Image
from synthetic import lines
from tensorboardX.proto.graph_pb2 import GraphDef
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from bnjax.clinic.statistics import Drift, Gap
from bnjax.data.batches import evenly_spaced
from bnjax.loss import softmax_cross_entropy
from bnjax.metrics import Metrics
from bnjax.train import build, parsing
from bnjax.train.graph import graph_def
from bnjax.train.jsonl import RunWriter, read_lines
from bnjax.train.tensorboard import CAPTION, TILE
from bnjax.train.trained import Trained
from bnjax.train_step import forward

DATA = synthetic.dataset()


def watched():
    config = synthetic.config()
    config.eval.histograms, config.eval.pictures, config.eval.gap_images = 256, 12, 16
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    synthetic.train(watched(), folder)
    return folder


@pytest.fixture(scope="module")
def values(finished):
    return read_values(finished / "tensorboard")


def test_the_gap_is_of_the_same_images_twice_and_the_drift_is_known_from_the_pixels(finished):
    run, last = Trained(finished, "last"), lines(finished, "gap")[-1]
    images = evenly_spaced(DATA.train, 16)
    assert (last["step"], last["count"]) == (12, 16)

    @functools.partial(jax.jit, static_argnames=("model", "train"))
    def loss(model, train):
        batch = {"image": images.image}
        logits, _ = forward(run.params, run.batch_stats, batch, model=model, train=train)
        return softmax_cross_entropy(logits, images.label).mean()

    assert last["loss"] == pytest.approx(float(loss(run.model, False)), rel=1e-5)
    # By the definition: training without dropped units, which normalises by the batch.
    by_batch = float(loss(run.model.clone(dropout=(0.0,)), True))
    assert last["loss"] != last["batch_loss"] == pytest.approx(by_batch, rel=1e-5)
    # The drift of the first norm, whose inputs are the pixels.
    x, epsilon = images.image / 255.0, run.config.model.epsilon
    stored = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run.batch_stats["conv0_norm"])
    var = x.var((0, 1, 2)) + epsilon
    off = (stored["mean"] - x.mean((0, 1, 2))) / np.sqrt(var)
    ratio = np.log((stored["var"] + epsilon) / var)
    # In float32 the sums of 1,024 pixels are known to some 1e-5 of their deviation.
    close = functools.partial(pytest.approx, rel=1e-4, abs=1e-5)
    assert last["drift_mean"]["conv0_norm"] == close(np.sqrt((off**2).mean()))
    assert last["drift_variance"]["conv0_norm"] == close(ratio.mean())
    assert list(last["drift_mean"]) == ["conv0_norm", "dense0_norm", "logits_norm"]


def test_what_is_not_finite_is_null(tmp_path):
    metrics = Metrics(np.float32(np.nan), 1, 4, 0)
    with RunWriter(tmp_path, start=0) as writer:
        writer.gap(1, Gap(metrics, metrics, {}), {"norm": Drift(np.inf, np.nan)})
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    nothing = {"norm": None}
    assert (line["loss"], line["drift_mean"], line["drift_variance"]) == (None, nothing, nothing)


def test_tensorboard_gets_every_number(finished, values):
    wanted = {}
    for line in read_lines(finished / "metrics.jsonl"):
        groups = {line["split"]: line} | {k: v for k, v in line.items() if isinstance(v, dict)}
        for group, curves in groups.items():
            for name, value in curves.items():
                if isinstance(value, float):
                    wanted.setdefault(f"{group}/{name}", []).append((line["step"], value))
    wanted["train/images_per_s"] = [
        (line["step"], line["images_per_s"]) for line in read_lines(finished / "timing.jsonl")
    ]
    scalars = {tag: found for tag, found in values.items() if found[0][1].HasField("simple_value")}
    assert {*scalars} == {*wanted}
    for tag, points in wanted.items():
        found = [(step, value.simple_value) for step, value in scalars[tag]]
        np.testing.assert_allclose(found, points, rtol=0.01 if "per_s" in tag else 1e-6)


def test_each_evaluation_leaves_its_histograms_once(finished, values):
    written = read_lines(finished / "histograms.jsonl")
    assert [line["step"] for line in written] == [5, 10, 12]
    layers = ["conv0", "dense0", "logits"]
    assert [*written[0]["activation"]] == [name for of in layers for name in (f"{of}_norm", of)]
    statistics = [f"{of}_norm.{leaf}" for of in layers for leaf in ("mean", "var")]
    assert [*written[0]["statistic"]] == statistics
    numbers = written[1]["gradient"]["dense0.kernel"]
    step, value = values["gradient/dense0.kernel"][1]
    assert step == 10
    # An empty bin stands before the first.
    assert value.histo.bucket[1:] == numbers["counts"]
    limits = np.linspace(numbers["low"], numbers["high"], len(numbers["counts"]) + 1)
    np.testing.assert_allclose(value.histo.bucket_limit, limits)


def test_looking_changes_no_training(finished, tmp_path):
    synthetic.train(synthetic.config(), tmp_path)
    unseen, seen = (read_lines(of / "metrics.jsonl") for of in (tmp_path, finished))
    assert unseen == [line for line in seen if line["split"] != "gap"]
    assert (tmp_path / "histograms.jsonl").read_bytes() == b""
    assert "test/predictions" not in read_values(tmp_path / "tensorboard")


def test_a_run_that_died_and_goes_on_has_every_histogram_once(finished, tmp_path):
    board, histograms = tmp_path / "tensorboard", tmp_path / "histograms.jsonl"
    with pytest.raises(StopIteration):
        synthetic.train(watched(), tmp_path, first=7)
    assert "_hparams_/session_end_info" not in read_values(board)
    with histograms.open("a") as file:
        file.write('{"step": 7, "activation": {}}\n{"step": 8, "sta')  # past the checkpoint; torn
    synthetic.train(watched(), tmp_path)
    assert histograms.read_bytes() == (finished / "histograms.jsonl").read_bytes()
    events = read_events(board)
    (graph,) = (event.graph_def for event in events if event.graph_def)
    model = build.experiment(watched(), DATA).model
    assert GraphDef.FromString(graph) == graph_def(model, (10, 8, 8, 1))
    # TensorBoard hides what the first part wrote from step 6 on.
    assert [event.step for event in events if event.HasField("session_log")] == [6]


def test_tensorboard_gets_the_hyperparameters_in_the_same_run(values):
    content = {
        tag.rpartition("/")[2]: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for tag, ((_, value), *_) in values.items()
        if tag.startswith("_hparams_")
    }
    assert set(content) == {"experiment", "session_start_info", "session_end_info"}
    hparams = content["session_start_info"].session_start_info.hparams
    assert hparams["model.momentum"].number_value == 0.75
    assert hparams["model.norm"].string_value == "batch"
    assert hparams["train.shuffle"].bool_value is True
    assert set(hparams) == set(parsing.flat(watched().to_dict()))
    experiment = content["experiment"].experiment
    assert {metric.name.tag for metric in experiment.metric_infos} <= set(values)
    # The first value that differs from its default.
    assert experiment.hparam_infos[0].name == "data.name"


def test_tensorboard_gets_test_images_with_predictions(values):
    assert [step for step, _ in values["test/predictions"]] == [5, 10, 12]
    sheet = Image.open(io.BytesIO(values["test/predictions"][0][1].image.encoded_image_string))
    assert sheet.size == (4 * TILE, 3 * (TILE + CAPTION))
    tiles = np.asarray(sheet).reshape(3, TILE + CAPTION, 4, TILE, 3).swapaxes(1, 2)
    for tile, image in zip(tiles.reshape(12, -1, TILE, 3), range(12), strict=True):
        # The sheet shows each pixel of an 8x8 image as a square of 15 pixels: compare the centres.
        middles = tile[11:124:15, 11:124:15]
        np.testing.assert_array_equal(middles, DATA.test.image[image * 20 // 12].repeat(3, axis=-1))
        assert (tile[TILE:] < 100).any()  # the caption
