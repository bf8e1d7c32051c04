"""What a trained network says of images, or of a whole split."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnjax.data.batches import eval_batches
from bnjax.data.feed import every_batch
from bnjax.data.pictures import Picture, read_pictures
from bnjax.errors import DataError
from bnjax.metrics import Metrics, from_losses
from bnjax.models.layers import with_views
from bnjax.train.cpu import compiler_options
from bnjax.train.trained import Trained
from bnjax.train_step import classes_and_scores, forward, softmax_cross_entropy
from bnjax.types import Batch, BatchStats, Params

MAX_BATCH = 256  # pictures at once


def of_split(
    trained: Trained, split: str, data_dir: str | None = None, views: int | None = None
) -> dict[str, Any]:
    """Returns predictions, loss and accuracy for the split "train" or "test" of a run's data.

    Each image goes through the network once, or is averaged over several views.

    Args:
        trained: the network.
        split: which.
        data_dir: where the data lie, if not where they lay in training.
        views: as in `bnjax.models.layers`; None for what the run was evaluated with.

    Raises:
        UserError: if the data are not found.
    """
    network = _Network(trained, views)
    dataset, classes = trained.dataset(data_dir), trained.data.classes
    chosen = dataset.train if split == "train" else dataset.test
    size = min(trained.config.eval.batch_size, len(chosen))
    predicted, metrics = network.predict(every_batch(chosen, size))
    found = _rows([f"{split}[{i}]" for i in range(len(chosen))], classes, predicted)
    label = predicted["label"]
    for row, truth in zip(found, label, strict=True):
        row["label"] = classes[truth]
    right = predicted["class"] == label
    per_class = {
        name: float(right[label == i].mean())
        for i, name in enumerate(classes)
        if (label == i).any()
    }
    sums = {**metrics.means(), "count": int(metrics.count), "accuracy_per_class": per_class}
    return network.about | {"predictions": found, **sums, "errors": []}


def of_images(trained: Trained, paths: list[Path], views: int | None = None) -> dict[str, Any]:
    """Returns predictions for image files, and under "errors" what cannot be read."""
    network = _Network(trained, views)
    pictures, failures = read(paths, trained.data.image_shape)
    found: list[dict[str, Any]] = []
    if pictures:
        images = np.stack([picture.image for picture in pictures])
        unknown = np.zeros(len(images), np.int32)
        predicted, _ = network.predict(eval_batches(images, unknown, min(len(images), MAX_BATCH)))
        found = rows(pictures, trained.data.classes, predicted)
    return network.about | {"predictions": found, "errors": failures}


class _Network:
    """A trained network, compiled to classify."""

    def __init__(self, trained: Trained, views: int | None):
        self._variables = (trained.params, trained.batch_stats)
        evaluation = trained.config.eval
        share = evaluation.views_share if views is None else 1.0
        views = evaluation.views if views is None else views
        self._classify = jax.jit(
            functools.partial(_classify, model=with_views(trained.model, views, share)),
            compiler_options=compiler_options(),
        )
        self.about = {
            "workdir": str(trained.workdir),
            "step": trained.step,
            "dataset": trained.data.label,
            "views": views,
        }

    def predict(self, batches: Iterable[Batch]) -> tuple[dict[str, np.ndarray], Metrics]:
        """Returns `class` and `label` int32 [n], `score` float32 [n, classes] and the metrics."""
        found = []
        for batch in batches:
            predicted, metrics = jax.device_get(self._classify(*self._variables, batch))
            real = batch.get("mask", slice(None))
            rows = {name: all_rows[real] for name, all_rows in predicted.items()}
            found.append((rows | {"label": np.array(batch["label"][real])}, metrics))
        joined = {
            name: np.concatenate([one[name] for one, _ in found])
            for name in ("class", "score", "label")
        }
        return joined, functools.reduce(Metrics.merge, [metrics for _, metrics in found])


def _classify(
    params: Params, batch_stats: BatchStats, batch: Batch, *, model: Any
) -> tuple[dict[str, jax.Array], Metrics]:
    """Returns what `predict_step` and `eval_step` return, from one pass."""
    logits, _ = forward(params, batch_stats, batch, model=model, train=False)
    losses = softmax_cross_entropy(logits, batch["label"])
    metrics = from_losses(losses, logits, batch["label"], batch.get("mask"))
    return classes_and_scores(logits), metrics


def read(paths: list[Path], shape: tuple[int, int, int]) -> tuple[list[Picture], list[str]]:
    """Returns the pictures that can be read, and what is wrong with the others."""
    pictures: list[Picture] = []
    failures: list[str] = []
    for path in paths:
        try:
            pictures.extend(read_pictures(path, shape))
        except DataError as error:
            failures.append(str(error))
    return pictures, failures


def rows(
    pictures: Sequence[Picture], classes: Sequence[str], predicted: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Returns an object for each picture; `predicted` has `class` [n], `score` [n, classes]."""
    found = _rows([picture.name for picture in pictures], classes, predicted)
    for row, picture in zip(found, pictures, strict=True):
        row |= {"note": picture.note} if picture.note else {}
    return found


def _rows(
    names: Sequence[str], classes: Sequence[str], predicted: dict[str, np.ndarray]
) -> list[dict[str, Any]]:
    return [
        {
            "image": name,
            "class": classes[index],
            "score": float(score[index]),
            "scores": dict(zip(classes, map(float, score), strict=True)),
        }
        for name, index, score in zip(names, predicted["class"], predicted["score"], strict=True)
    ]


def table(result: dict[str, Any]) -> str:
    """Returns a result as lines of text."""
    return "\n".join(_lines(result))


def _lines(result: dict[str, Any]) -> Iterator[str]:
    shown = result["predictions"]
    if shown:
        columns = [
            column
            for column in ("image", "label", "class", "score", "note")
            if any(column in row for row in shown)
        ]
        cells = [
            columns,
            *(
                [f"{row[c]:.4f}" if c == "score" else str(row.get(c, "")) for c in columns]
                for row in shown
            ),
        ]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        yield from (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        )
    if "accuracy" in result:
        images = f"{result['count']:,} images"
        yield f"\n{result['dataset']}, {images}, checkpoint of step {result['step']}"
        if result["views"] > 1:
            yield f"  logits: the mean over {result['views']} views of each image"
        yield from (
            f"  accuracy of {name}: {accuracy:.4f}"
            for name, accuracy in result["accuracy_per_class"].items()
        )
        yield f"loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f}"
