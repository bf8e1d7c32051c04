"""The page to try a network on, through its endpoint on this machine."""

import gc
from functools import partial

import jax
import numpy as np
import pytest
import synthetic
from PIL import Image

from bnjax import clinic
from bnjax.data.pictures import read_pictures
from bnjax.export.stablehlo import Exported, export_run
from bnjax.train.trained import Trained
from bnjax.train_step import predict_step

pytestmark = pytest.mark.filterwarnings("ignore")  # Gradio's and its server's own


@pytest.fixture(scope="module")
def page():
    """The module, which imports Gradio: seconds, that other workers need not spend."""
    from bnjax.export import page

    return page


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "small"
    synthetic.train(synthetic.config(2), workdir)
    return Trained(workdir, "last")


@pytest.fixture(scope="module")
def predict(page, trained):
    import gradio_client

    demo = page.page(page.Scores(trained))
    client = gradio_client.Client(page.launch(demo, "127.0.0.1", None), verbose=False)

    def call(*files):
        handles = [gradio_client.handle_file(str(file)) for file in files]
        return client.predict(handles, api_name="/predict")

    yield call
    client.close()
    demo.close()
    del demo
    gc.collect()  # Gradio's event loops are never closed; elsewhere that would be an error


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(3)]
    for file in files:
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(file)
    return files


def test_scores_are_those_of_the_network_and_the_batch_changes_them(trained, predict, pictures):
    *labels, table, plot = predict(*pictures)
    images = np.stack([read_pictures(file, (8, 8, 1))[0].image for file in pictures])
    variables = (trained.params, trained.batch_stats)
    score = jax.jit(partial(predict_step, model=trained.model))(*variables, images)["score"]
    network = clinic.precise(trained.network, [{"image": images}])
    together = predict_step(network.params, network.batch_stats, images, model=trained.model)
    for label, wanted in zip(labels, (score, together["score"]), strict=False):
        found = {one["label"]: one["confidence"] for one in label["confidences"]}
        wanted = dict(zip(trained.data.classes, np.asarray(wanted)[0], strict=True))
        assert found == pytest.approx(wanted, abs=1e-4)
    assert labels[1] != labels[0] != labels[2]
    assert [row[0] for row in table["data"]] == [file.name for file in pictures]
    assert len(plot["data"]["data"] if "data" in plot.get("data", {}) else plot) > 0


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["broken.png"], "broken.png cannot be read as an image"),
        (["0.png"] * 33, "Give 1 to 32 images"),
        (["many.npy"], "Invalid file type"),
        (["large.png"], "more than 24,000,000 pixels"),
    ],
)
def test_what_cannot_be_scored_is_said(predict, pictures, files, said):
    from gradio_client.exceptions import AppError

    folder = pictures[0].parent
    (folder / "broken.png").write_bytes(b"\x89PNG no image")
    np.save(folder / "many.npy", np.zeros((33, 8, 8), np.uint8))
    Image.new("1", (6000, 4001)).save(folder / "large.png")
    with pytest.raises(AppError, match=said):
        predict(*(folder / name for name in files))
    assert predict(pictures[0])  # it goes on


def test_an_exported_network_has_the_stored_statistics_only(page, trained, pictures, tmp_path):
    export_run(trained, tmp_path / "model")
    scores = page.ExportedScores(Exported(tmp_path / "model"))
    images = np.stack([read_pictures(file, (8, 8, 1))[0].image for file in pictures])
    found, drifts = scores(images)
    predict = jax.jit(partial(predict_step, model=trained.model))
    wanted = predict(trained.params, trained.batch_stats, images)
    assert list(found) == ["stored"]
    np.testing.assert_allclose(found["stored"][:3], wanted["score"], atol=1e-5)
    assert drifts == {}
    assert page.page(scores).blocks
