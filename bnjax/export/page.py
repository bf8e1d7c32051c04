"""A Gradio page that shows the scores of a network for uploaded images."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads this when it is imported

import gradio
import jax
import jax.numpy as jnp
import numpy as np

from bnjax.clinic.network import NormLayer, nothing_seen
from bnjax.clinic.statistics import drift, put
from bnjax.data.pictures import read_pictures
from bnjax.errors import DataError
from bnjax.export.stablehlo import Exported
from bnjax.train.cpu import compiler_options
from bnjax.train.trained import Trained
from bnjax.train_step import classes_and_scores
from bnjax.types import BatchStats, Images

MAX_IMAGES = 32  # per request; smaller batches are padded
MAX_BYTES = 8_000_000  # per file
MAX_PIXELS = 24_000_000  # per image, before resizing
MAX_WAITING = 16  # requests in the queue
# The names of the statistics by which batch norms can normalise.
STORED, BATCH, NONE = "stored", "batch", "no"


class Scores:
    """Computes scores of a run's network with stored, batch and no statistics.

    Attributes:
        name: the name of the config.
        classes: the class names, in the order of the scores.
        image_shape: the shape [h, w, c] of one image.
        statistics: the names of the available statistics.
    """

    def __init__(self, trained: Trained):
        """Stores the network; the first call compiles it."""
        self.name, self.classes = trained.config.name, trained.data.classes
        self.image_shape = trained.data.image_shape
        self._network = trained.network
        like = {"image": np.zeros((MAX_IMAGES, *self.image_shape), np.float32)}
        self._norms: Sequence[NormLayer] = self._network.norms(like)
        self.statistics = (STORED, BATCH, NONE) if self._norms else (STORED,)
        self._observe = jax.jit(
            type(self._network).observe,
            static_argnames="mode",
            compiler_options=compiler_options(),
        )

    def __call__(self, images: Images) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns a dict of scores [n, classes], keyed by statistics, and the drift of each norm.

        Args:
            images: at most `MAX_IMAGES` images, float32 [n, h, w, c] from 0 to 1.
        """
        stored = self._network.batch_stats
        scores, own, count = {}, stored, len(images)
        filling = np.zeros((MAX_IMAGES - count, *self.image_shape), np.float32)
        batch = {
            "image": np.concatenate([images, filling]),
            "mask": np.arange(MAX_IMAGES) < count,
        }
        for name in self.statistics:
            stats = without_statistics(stored) if name == NONE else stored
            mode = "batch" if name == BATCH else "running"
            network = dataclasses.replace(self._network, batch_stats=stats)
            logits, seen = self._observe(network, nothing_seen(stats), batch, mode=mode)
            scores[name] = np.asarray(classes_and_scores(logits)["score"])[:count]
            if name == BATCH:
                own = put(stored, seen, self._norms)
        return scores, drift(stored, own, self._norms)


class ExportedScores:
    """Computes the scores of an exported network, which has only stored statistics."""

    statistics = (STORED,)

    def __init__(self, exported: Exported):
        """Stores the network; the first call compiles it."""
        about = exported.manifest
        self.name, self.classes = about.name, tuple(about.classes)
        self.image_shape = tuple(about.image_shape)
        self._exported = exported

    def __call__(self, images: Images) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns the scores of images, with pixels rounded to 8 bits."""
        logits = self._exported.logits(images, MAX_IMAGES)
        score = classes_and_scores(jnp.asarray(logits))["score"]
        return {STORED: np.asarray(score)}, {}


def without_statistics(batch_stats: BatchStats) -> BatchStats:
    """Returns running statistics that have no effect (means of 0 and variances of 1)."""
    blank = {"mean": jnp.zeros_like, "var": jnp.ones_like}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: blank.get(path[-1].key, jnp.asarray)(leaf), batch_stats
    )


def page(scores: Scores | ExportedScores) -> gradio.Blocks:
    """Returns the page for a network; programs can use its endpoint /predict."""
    import pandas

    height, width, _ = scores.image_shape

    def predict(files: list[str] | None) -> tuple[Any, ...]:
        images = _read(files or [], scores.image_shape)
        found, drifts = scores(np.stack(images))
        labels = [
            dict(zip(scores.classes, map(float, of[0]), strict=True)) for of in found.values()
        ]
        rows = [
            [Path(file).name, *(_best(of[i], scores.classes) for of in found.values())]
            for i, file in enumerate(files or [])
        ]
        layers = pandas.DataFrame(
            [{"norm": name, "drift": one.mean} for name, one in drifts.items()] or None,
            columns=["norm", "drift"],
        )
        return (*labels, rows, layers)

    with gradio.Blocks(title=f"bnjax: {scores.name}") as demo:
        how = (
            " The batch norms normalise by the stored running statistics, by the statistics of all "
            "uploaded images together, or not at all."
        )
        gradio.Markdown(
            f"# {scores.name}\nUpload up to {MAX_IMAGES} PNG or JPEG images; they are resized to "
            f"{width}x{height}.{how if len(scores.statistics) > 1 else ''}"
        )
        files = gradio.File(
            file_count="multiple", file_types=[".png", ".jpg", ".jpeg"], label="Images"
        )
        with gradio.Row():
            labels = [
                gradio.Label(num_top_classes=5, label=f"First image, {name} statistics")
                for name in scores.statistics
            ]
        table = gradio.Dataframe(
            headers=["image", *(f"{name} statistics" for name in scores.statistics)],
            label="All images",
        )
        plot = gradio.BarPlot(
            x="norm",
            y="drift",
            title="Stored mean minus mean over these images, in standard deviations (RMS)",
            y_lim=[0, None],
            sort=None,
            visible=len(scores.statistics) > 1,
        )
        outputs = [*labels, table, plot]
        files.upload(predict, files, outputs, api_name="predict", concurrency_limit=1)
    return demo.queue(max_size=MAX_WAITING)


def _read(files: Sequence[str], shape: Sequence[int]) -> list[np.ndarray]:
    """Reads the uploaded files; rejects files beyond the limits."""
    if not 1 <= len(files) <= MAX_IMAGES:
        raise gradio.Error(f"Give 1 to {MAX_IMAGES} images, not {len(files)}.")
    height, width, channels = shape
    try:
        pictures = [
            read_pictures(
                Path(file), (height, width, channels), name=Path(file).name, max_pixels=MAX_PIXELS
            )
            for file in files
        ]
    except DataError as error:
        raise gradio.Error(str(error)) from error
    return [picture.image for of_file in pictures for picture in of_file]


def _best(score: np.ndarray, classes: Sequence[str]) -> str:
    return f"{classes[int(score.argmax())]} {score.max():.2f}"


def launch(demo: gradio.Blocks, host: str, port: int | None) -> str:
    """Starts a server for the page in a thread, without internet access; returns its address."""
    _, url, _ = demo.launch(
        server_name=host,
        server_port=port,
        max_file_size=MAX_BYTES,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        prevent_thread_lock=True,
        share=False,
        quiet=True,
        show_error=True,
    )
    return url
