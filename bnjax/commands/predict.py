"""`bnjax predict`: classes and scores of images, from a run's network or an exported one."""

import functools
import json as json_
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from bnjax.commands import Checkpoint, DataDir, Json
from bnjax.errors import DataError, UserError

if TYPE_CHECKING:
    import numpy as np

    from bnjax.data.pictures import Picture
    from bnjax.metrics import Metrics
    from bnjax.train.trained import Trained
    from bnjax.types import Batch

MAX_BATCH = 256  # pictures at once


def run(
    images: Annotated[
        Positional[tuple[Path, ...]],
        arg(
            metavar="IMAGE",
            help="PNG, JPEG or .npy ([h, w, c] or [n, h, w, c]; uint8, or float from 0 to 1)",
        ),
    ] = (),
    split: Annotated[
        Literal["train", "test"] | None,
        arg(help="classify this split; ends with loss, accuracy and accuracy per class"),
    ] = None,
    workdir: Annotated[Path | None, arg(metavar="DIR", help="the folder of the run")] = None,
    checkpoint: Checkpoint = "last",
    data_dir: DataDir = None,
    model: Annotated[
        Path | None,
        arg(metavar="DIR", help="the folder of an exported network, which takes pixels of 8 bits"),
    ] = None,
    views: Annotated[
        Literal[1, 2, 6] | None,
        arg(
            help="views of each image, whose logits are averaged: 2, with its mirror image; 6, "
            "also shifted by a pixel; by default as the run was evaluated"
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Classify images, or a whole split, with a trained network.

    Exits with 1 if an image could not be read.
    """
    if bool(images) == bool(split):
        raise UserError("give either images or --split.")
    if bool(workdir) == bool(model):
        raise UserError("give either --workdir, the folder of a run, or --model.")
    if model and (split or data_dir or views or checkpoint != "last"):
        raise UserError(
            "--split, --data-dir, --views and --checkpoint are of a run: give its folder with "
            "--workdir. An exported network has no data and one set of weights."
        )
    from bnjax.train.cpu import prepare

    prepare()
    if model:
        result = _of_model(model, images)
    else:
        from bnjax.train.trained import Trained

        network = Classifier(Trained(Path(str(workdir)), checkpoint), views)
        result = network.of_split(split, data_dir) if split else network.of_images(images)
    if text := json_.dumps(result) if json else _table(result):
        print(text)
    for failure in result["errors"]:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if result["errors"] else 0


class Classifier:
    """The network of a run, compiled to classify."""

    def __init__(self, trained: "Trained", views: int | None):
        import jax

        from bnjax.models.layers import with_views
        from bnjax.train.cpu import compiler_options

        evaluation = trained.config.eval
        share = evaluation.views_share if views is None else 1.0
        views = evaluation.views if views is None else views
        self._trained = trained
        self._classify = jax.jit(
            functools.partial(_classify, model=with_views(trained.model, views, share)),
            compiler_options=compiler_options(),
        )
        self._about = {
            "workdir": str(trained.workdir),
            "step": trained.step,
            "dataset": trained.data.label,
            "views": views,
        }

    def of_split(self, split: str, data_dir: str | None) -> dict[str, Any]:
        """Returns predictions, loss and accuracy of a split of the run's data."""
        from bnjax.data.feed import every_batch

        classes, dataset = self._trained.data.classes, self._trained.dataset(data_dir)
        chosen = dataset.train if split == "train" else dataset.test
        size = min(self._trained.config.eval.batch_size, len(chosen))
        predicted, metrics = self._predict(every_batch(chosen, size))
        found = rows([f"{split}[{i}]" for i in range(len(chosen))], classes, predicted)
        label = predicted["label"]
        for row, truth in zip(found, label, strict=True):
            row["label"] = classes[truth]
        right = predicted["class"] == label
        per_class = {
            name: float(right[label == i].mean())
            for i, name in enumerate(classes)
            if (label == i).any()
        }
        sums = metrics.means() | {"count": int(metrics.count), "accuracy_per_class": per_class}
        return self._about | {"predictions": found, **sums, "errors": []}

    def of_images(self, paths: Sequence[Path]) -> dict[str, Any]:
        """Returns predictions for image files, and under "errors" those that cannot be read."""
        import numpy as np

        from bnjax.data.batches import eval_batches

        pictures, failures = _read(paths, self._trained.data.image_shape)
        found: list[dict[str, Any]] = []
        if pictures:
            stacked = np.stack([picture.image for picture in pictures])
            unknown = np.zeros(len(stacked), np.int32)
            batches = eval_batches(stacked, unknown, min(len(stacked), MAX_BATCH))
            found = _of_pictures(pictures, self._trained.data.classes, self._predict(batches)[0])
        return self._about | {"predictions": found, "errors": failures}

    def _predict(self, batches: "Iterable[Batch]") -> "tuple[dict[str, np.ndarray], Metrics]":
        """Returns `class` and `label` int32 [n], `score` float32 [n, classes] and the metrics."""
        import jax
        import numpy as np

        from bnjax.metrics import Metrics

        found = []
        for batch in batches:
            variables = (self._trained.params, self._trained.batch_stats)
            predicted, metrics = jax.device_get(self._classify(*variables, batch))
            predicted["label"] = np.asarray(batch["label"])
            real = batch.get("mask", slice(None))
            found.append(({name: one[real] for name, one in predicted.items()}, metrics))
        joined = {name: np.concatenate([one[name] for one, _ in found]) for name in found[0][0]}
        return joined, functools.reduce(Metrics.merge, [metrics for _, metrics in found])


def _classify(params: Any, batch_stats: Any, batch: "Batch", *, model: Any) -> Any:
    """Returns the results of `predict_step` and `eval_step` from one pass."""
    from bnjax.metrics import from_losses
    from bnjax.train_step import classes_and_scores, forward, softmax_cross_entropy

    logits, _ = forward(params, batch_stats, batch, model=model, train=False)
    losses = softmax_cross_entropy(logits, batch["label"])
    metrics = from_losses(losses, logits, batch["label"], batch.get("mask"))
    return classes_and_scores(logits), metrics


def _of_model(folder: Path, paths: Sequence[Path]) -> dict[str, Any]:
    """Returns predictions of an exported network for image files."""
    import jax.numpy as jnp
    import numpy as np

    from bnjax.export.stablehlo import Exported
    from bnjax.train_step import classes_and_scores

    exported = Exported(folder)
    about = exported.manifest
    height, width, channels = about.image_shape
    pictures, failures = _read(paths, (height, width, channels))
    found: list[dict[str, Any]] = []
    if pictures:
        stacked = np.stack([picture.image for picture in pictures])
        pixels = np.round(stacked * 255).astype(np.uint8)
        logits = exported.logits(pixels, min(len(pixels), MAX_BATCH))
        predicted = {
            name: np.asarray(one) for name, one in classes_and_scores(jnp.asarray(logits)).items()
        }
        found = _of_pictures(pictures, about.classes, predicted)
    what = {"model": str(folder), "step": about.step, "dataset": about.dataset}
    return what | {"predictions": found, "errors": failures}


def _read(paths: Sequence[Path], shape: tuple[int, int, int]) -> "tuple[list[Picture], list[str]]":
    """Returns the pictures that can be read, and the errors of the others."""
    from bnjax.data.pictures import read_pictures

    pictures: list[Picture] = []
    failures: list[str] = []
    for path in paths:
        try:
            pictures.extend(read_pictures(path, shape))
        except DataError as error:
            failures.append(str(error))
    return pictures, failures


def _of_pictures(
    pictures: "Sequence[Picture]", classes: Sequence[str], predicted: "dict[str, np.ndarray]"
) -> list[dict[str, Any]]:
    found = rows([picture.name for picture in pictures], classes, predicted)
    for row, picture in zip(found, pictures, strict=True):
        row |= {"note": picture.note} if picture.note else {}
    return found


def rows(
    names: Sequence[str], classes: Sequence[str], predicted: "dict[str, np.ndarray]"
) -> list[dict[str, Any]]:
    """Returns an object for each image from `class` [n] and `score` [n, classes]."""
    return [
        {
            "image": name,
            "class": classes[index],
            "score": float(score[index]),
            "scores": dict(zip(classes, map(float, score), strict=True)),
        }
        for name, index, score in zip(names, predicted["class"], predicted["score"], strict=True)
    ]


def _table(result: dict[str, Any]) -> str:
    from bnjax.text import text_table

    shown, lines = result["predictions"], []
    if shown:
        columns = [
            name
            for name in ("image", "label", "class", "score", "note")
            if any(name in row for row in shown)
        ]
        cells = [
            [f"{row[name]:.4f}" if name == "score" else row.get(name, "") for name in columns]
            for row in shown
        ]
        lines.append(text_table([columns, *cells]))
    if "accuracy" in result:
        images = f"{result['count']:,} images"
        lines.append(f"\n{result['dataset']}, {images}, checkpoint of step {result['step']}")
        if result["views"] > 1:
            lines.append(f"  logits: the mean over {result['views']} views of each image")
        lines += [
            f"  accuracy of {name}: {accuracy:.4f}"
            for name, accuracy in result["accuracy_per_class"].items()
        ]
        lines.append(f"loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f}")
    return "\n".join(lines)
