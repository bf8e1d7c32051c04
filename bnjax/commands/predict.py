"""`bnjax predict`: classifies images with the network of a run or an exported network."""

import dataclasses
import json as json_
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from bnjax.commands import Checkpoint, DataDir, Json
from bnjax.errors import DataError, UserError
from bnjax.text import progress

if TYPE_CHECKING:
    import numpy as np

    from bnjax.clinic.linen import Linen
    from bnjax.data.pictures import Picture
    from bnjax.train.trained import Trained

MAX_BATCH = 256  # the largest number of images per batch


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
        arg(help="classify this split and print loss, accuracy and accuracy per class"),
    ] = None,
    workdir: Annotated[Path | None, arg(metavar="DIR", help="the folder of the run")] = None,
    checkpoint: Checkpoint = "last",
    data_dir: DataDir = None,
    model: Annotated[
        Path | None, arg(metavar="DIR", help="the folder of an exported network (8-bit pixels)")
    ] = None,
    views: Annotated[
        Literal[1, 2, 6] | None,
        arg(
            help="average the logits over this many views of each image; 2: the image and its "
            "mirror image; 6: also copies of both shifted by a pixel; default: as in the run's "
            "evaluation"
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Classify images or a whole split with a trained network.

    The exit status is 1 if an image cannot be read.
    """
    if bool(images) == bool(split):
        raise UserError("give either images or --split.")
    if bool(workdir) == bool(model):
        raise UserError("give either --workdir, the folder of a run, or --model.")
    if model and (split or data_dir or views or checkpoint != "last"):
        raise UserError(
            "--split, --data-dir, --views and --checkpoint need a run: give its folder with "
            "--workdir. An exported network has no data and a single set of weights."
        )
    import numpy as np

    from bnjax.export.stablehlo import Exported
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained, logits

    prepare()
    facts: Any
    if model:
        exported = Exported(model)
        facts = exported.manifest
        result = {"model": str(model), "step": facts.step, "dataset": facts.dataset}

        def logits_of(pixels: np.ndarray) -> np.ndarray:
            return exported.logits(pixels, min(len(pixels), MAX_BATCH))

    else:
        trained = Trained(Path(str(workdir)), checkpoint)
        facts, (network, result) = trained.data, _evaluated(trained, views)

        def logits_of(pixels: np.ndarray) -> np.ndarray:
            return logits(network, pixels, MAX_BATCH)

    if split:
        result = of_split(trained, split, views, data_dir)
    else:
        result |= of_images(images, tuple(facts.image_shape), facts.classes, logits_of)
    if text := json_.dumps(result) if json else _table(result):
        print(text)
    for failure in result["errors"]:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if result["errors"] else 0


def of_split(
    trained: "Trained", split: str, views: int | None = None, data_dir: str | None = None
) -> dict[str, Any]:
    """Returns the predictions, loss and accuracy of a run's network on a split of its data."""
    from bnjax.train.trained import logits_and_labels, loss_and_accuracy

    classes, dataset = trained.data.classes, trained.dataset(data_dir)
    chosen = dataset.train if split == "train" else dataset.test
    network, result = _evaluated(trained, views)
    logits, label = logits_and_labels(network, chosen, trained.config.eval.batch_size)
    predictions = _predictions([f"{split}[{i}]" for i in range(len(label))], classes, logits)
    for row, truth in zip(predictions, label, strict=True):
        row["label"] = classes[truth]
    right = logits.argmax(-1) == label
    result |= loss_and_accuracy(logits, label)
    return result | {
        "predictions": predictions,
        "count": len(label),
        "accuracy_per_class": {
            name: float(right[label == i].mean())
            for i, name in enumerate(classes)
            if (label == i).any()
        },
        "errors": [],
    }


def of_images(
    paths: Sequence[Path],
    shape: tuple[int, int, int],
    classes: Sequence[str],
    logits_of: "Callable[[np.ndarray], np.ndarray]",
) -> dict[str, Any]:
    """Returns predictions for image files; the key "errors" lists the unreadable files."""
    import numpy as np

    from bnjax.data.pictures import read_pictures

    pictures: list[Picture] = []
    errors: list[str] = []
    predictions: list[dict[str, Any]] = []
    for path in progress(paths, "reading images", "file"):
        try:
            pictures += read_pictures(path, shape)
        except DataError as error:
            errors.append(str(error))
    if pictures:
        logits = logits_of(np.stack([picture.image for picture in pictures]))
        predictions = _predictions([picture.name for picture in pictures], classes, logits)
    for row, picture in zip(predictions, pictures, strict=True):
        row |= {"note": picture.note} if picture.note else {}
    return {"predictions": predictions, "errors": errors}


def _evaluated(trained: "Trained", views: int | None) -> "tuple[Linen, dict[str, Any]]":
    """Returns the network with averaged views, and facts about it for the result.

    By default, uses the views of the run's evaluation.
    """
    from bnjax.models.layers import with_views

    evaluation = trained.config.eval
    share = evaluation.views_share if views is None else 1.0
    views = evaluation.views if views is None else views
    model = with_views(trained.model, views, share)
    return dataclasses.replace(trained.network, model=model), {
        "workdir": str(trained.workdir),
        "step": trained.step,
        "dataset": trained.data.label,
        "views": views,
    }


def _predictions(
    names: Sequence[str], classes: Sequence[str], logits: "np.ndarray"
) -> list[dict[str, Any]]:
    """Returns the class and the scores of each image."""
    import jax
    import jax.numpy as jnp

    from bnjax.train_step import classes_and_scores

    found = jax.device_get(classes_and_scores(jnp.asarray(logits)))
    return [
        {
            "image": name,
            "class": classes[index],
            "score": float(score[index]),
            "scores": dict(zip(classes, map(float, score), strict=True)),
        }
        for name, index, score in zip(names, found["class"], found["score"], strict=True)
    ]


def _table(result: dict[str, Any]) -> str:
    from bnjax.text import text_table

    shown, lines = result["predictions"], []
    if shown and "accuracy" not in result:  # a split has too many images; --json lists them
        columns = ("image", "label", "class", "score", "note")
        present = [name for name in columns if any(name in row for row in shown)]
        cells = [
            [f"{row[name]:.4f}" if name == "score" else row.get(name, "") for name in present]
            for row in shown
        ]
        lines.append(text_table([present, *cells]))
    if "accuracy" in result:
        images = f"{result['count']:,} images"
        lines.append(f"\n{result['dataset']}, {images}, checkpoint of step {result['step']}")
        if result["views"] > 1:
            lines.append(f"  logits: the mean over {result['views']} views of each image")
        for name, accuracy in result["accuracy_per_class"].items():
            lines.append(f"  accuracy of {name}: {accuracy:.4f}")
        lines.append(f"loss {result['loss']:.4f}, accuracy {result['accuracy']:.4f}")
    return "\n".join(lines)
