"""What an exported network says of a user's own images."""

from pathlib import Path
from typing import Any

import numpy as np

from bnjax.export.exported import Exported
from bnjax.train.predict import MAX_BATCH, read, rows
from bnjax.train_step import classes_and_scores


def of_images(exported: Exported, paths: list[Path]) -> dict[str, Any]:
    """Returns predictions for image files, and under "errors" what cannot be read.

    As `bnjax.train.predict.of_images` does for a run, but for images of pixels of 8 bits.
    """
    about = exported.manifest
    height, width, channels = about.image_shape
    pictures, failures = read(paths, (height, width, channels))
    found: list[dict[str, Any]] = []
    if pictures:
        images = np.stack([picture.image for picture in pictures])
        pixels = np.round(images * 255).astype(np.uint8)
        logits = exported.logits(pixels, min(len(pixels), MAX_BATCH))
        predicted = {name: np.asarray(one) for name, one in classes_and_scores(logits).items()}
        found = rows(pictures, about.classes, predicted)
    what = {"model": str(exported.folder), "step": about.step, "dataset": about.dataset}
    return what | {"predictions": found, "errors": failures}
