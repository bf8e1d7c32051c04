"""Image classification sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bnjax.errors import DataError

Split = tuple[np.ndarray, np.ndarray]


def import_tfds() -> ModuleType:
    """Returns the package `tensorflow_datasets`, imported late because that takes its time, its notices silenced."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    import tensorflow_datasets

    return tensorflow_datasets


def is_prepared(name: str, data_dir: str) -> bool:
    """Tells whether there is any prepared copy of the set, without importing TFDS where its folder does not exist."""
    folder = Path(data_dir or "~/tensorflow_datasets").expanduser() / name.partition("/")[0].partition(":")[0]
    return any(folder.rglob("dataset_info.json"))


def read(name: str, data_dir: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Returns train and test, each images uint8 [n, h, w, c] and labels int32 [n], and the class names.

    The test split is "test", or "validation" where there is none. Examples that carry an `id` are sorted by it, which
    for CIFAR is the order of the original files.

    Args:
        name: as TFDS names it, a config and a version included.
        data_dir: where TFDS keeps its copies; its own default if empty.

    Raises:
        DataError: if there is no copy that can be read without TensorFlow, or it does not hold labelled images of one size.
    """
    tfds = import_tfds()
    try:
        sources = tfds.data_source(name, data_dir=data_dir or None, download=False)
    except Exception as error:  # TFDS's types differ between "unknown", "not prepared", "TFRECORD" and "needs tensorflow"
        raise DataError(_how_to_prepare(name, data_dir, error)) from error
    held_out = "test" if "test" in sources else "validation"
    if "train" not in sources or held_out not in sources:
        raise DataError(f"the TFDS set {name!r} has the splits {sorted(sources)}; bnjax needs 'train' and 'test' or 'validation'.")
    features = sources["train"].dataset_info.features
    if features is None or "image" not in features or not hasattr(features.get("label"), "names"):
        raise DataError(f"the TFDS set {name!r} is not one of labelled images: it needs the features 'image' and 'label'.")
    return _arrays(name, sources["train"]), _arrays(name, sources[held_out]), tuple(features["label"].names)


def _arrays(name: str, source: Any) -> Split:
    examples = list(source)
    if examples and "id" in examples[0]:
        examples.sort(key=lambda example: example["id"])
    shapes = {example["image"].shape for example in examples}
    if len(shapes) != 1:
        some = ", ".join(str(shape) for shape in sorted(shapes)[:3]) or "none"
        raise DataError(f"the images of the TFDS set {name!r} are not all of one size ({some}); bnjax needs a set with one size.")
    return np.stack([example["image"] for example in examples]), np.array([example["label"] for example in examples], np.int32)


def _how_to_prepare(name: str, data_dir: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:200]
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        f"there is no copy of the TFDS set {name!r} that can be read without TensorFlow ({type(error).__name__}: {reason}). "
        "Preparing one as array_record needs TensorFlow, once and anywhere; bnjax then reads it without:\n"
        "    pip install tensorflow tensorflow-datasets array_record\n"
        f"    python -c \"import tensorflow_datasets as tfds; tfds.builder({name!r}{where}, file_format='array_record')"
        '.download_and_prepare()"\n'
        "and, in another place than tensorflow_datasets' own folder, --config.data.dir=FOLDER."
    )
