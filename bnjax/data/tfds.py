"""Image classification sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import contextlib
import difflib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bnjax.errors import DataError, UnavailableError
from bnjax.quiet import drop_logs

READABLE = "array_record"  # of TFDS's file formats, the one that needs no TensorFlow

Split = tuple[np.ndarray, np.ndarray]


def import_tfds() -> ModuleType:
    """Returns the package `tensorflow_datasets`, imported late because that takes its time."""
    drop_logs("tensorflow_datasets")
    import tensorflow_datasets

    return tensorflow_datasets


def find(name: str, data_dir: str) -> Path | None:
    """Returns the folder that holds a readable copy of the set, `data_dir` or else TFDS's own.

    TFDS is not imported.
    """
    return next((root for root in _roots(data_dir) if READABLE in _formats(root, name)), None)


def folder(name: str, data_dir: str) -> Path:
    """Returns the folder of a readable copy of the set, which has its files; TFDS is not imported.

    Of several versions it is the newest.

    Raises:
        UnavailableError: if there is no copy that can be read without TensorFlow.
        DataError: if there is no such set, or there are several configs of it.
    """
    root = find(name, data_dir)
    if root is None:
        raise _missing(name, data_dir)
    copies = [file.parent for file in _infos(root, name) if READABLE in _formats_in(file)]
    configs = sorted({str(copy.parent.relative_to(root)) for copy in copies})
    if len(configs) > 1:
        raise DataError(
            f"{root} has several configs of the TFDS set {name!r}. Name one of them: "
            f"{', '.join(configs)}."
        )
    return max(copies, key=lambda copy: [*map(int, re.findall(r"\d+", copy.name))])


def read(name: str, data_dir: str) -> tuple[Split, Split, tuple[str, ...]]:
    """Returns train and test, images uint8 [n, h, w, c] and labels int32 [n], and the classes.

    The test split is "test", or "validation" where there is none. Examples that carry an `id` are
    sorted by it, which for CIFAR is the order of the original files.

    Args:
        name: as TFDS names it, a config and a version included.
        data_dir: where TFDS keeps its copies; looked into before its own default.

    Raises:
        UnavailableError: if there is no copy that can be read without TensorFlow.
        DataError: if there is no such set, or the copy is damaged or does not hold labelled images
            of one size.
    """
    root = find(name, data_dir)
    if root is None:
        raise _missing(name, data_dir)
    with _naming(name, root):
        sources = import_tfds().data_source(name, data_dir=root, download=False)
    held_out = "test" if "test" in sources else "validation"
    if "train" not in sources or held_out not in sources:
        raise DataError(
            f"the TFDS set {name!r} has the splits {sorted(sources)}; bnjax needs 'train' and "
            "'test' or 'validation'."
        )
    classes = _classes(name, dict(sources["train"].dataset_info.features.items()))
    with _naming(name, root):
        train, test = (_arrays(name, sources[split], len(classes)) for split in ("train", held_out))
    return train, test, classes


@contextlib.contextmanager
def _naming(name: str, root: Path) -> Iterator[None]:
    """Turns whatever TFDS raises for a damaged copy into an error that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"the copy of the TFDS set {name!r} in {root} cannot be read ({type(error).__name__}: "
            f"{reason}). "
            f"Remove it and prepare it again:\n{_recipe(name, root)}"
        ) from error


def _classes(name: str, features: dict[str, Any]) -> tuple[str, ...]:
    kinds = import_tfds().features
    image, label = features.get("image"), features.get("label")
    if (
        not isinstance(image, kinds.Image)
        or np.dtype(image.np_dtype) != np.uint8
        or not isinstance(label, kinds.ClassLabel)
    ):
        raise DataError(
            f"the TFDS set {name!r} holds {sorted(features)}; bnjax needs an 'image' of 8 bits and "
            "a 'label' that is a class."
        )
    return tuple(label.names)


def _arrays(name: str, source: Any, classes: int) -> Split:
    image = np.empty(
        (len(source), *(source[0]["image"].shape if len(source) else (0, 0, 0))), np.uint8
    )
    label = np.empty(len(source), np.int32)
    ids = []
    for i, example in enumerate(source):
        if example["image"].shape != image.shape[1:]:
            sizes = f"{image.shape[1:]} and {example['image'].shape}"
            raise DataError(
                f"the images of the TFDS set {name!r} are not all of one size ({sizes}); bnjax "
                "needs a set with one size."
            )
        if not 0 <= example["label"] < classes:
            raise DataError(
                f"the TFDS set {name!r} has the label {example['label']} in a split; bnjax needs "
                f"all of them from 0 to {classes - 1}."
            )
        image[i], label[i] = example["image"], example["label"]
        ids.append(example.get("id", i))
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return (image, label) if order == list(range(len(ids))) else (image[order], label[order])


def _roots(data_dir: str) -> list[Path]:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return [Path(root).expanduser() for root in (data_dir, default) if root]


def _formats(root: Path, name: str) -> set[str]:
    """Returns the file formats of the copies of a set below a folder."""
    return {found for file in _infos(root, name) for found in _formats_in(file)}


def _infos(root: Path, name: str) -> list[Path]:
    path, _, version = name.partition(":")
    return [*(root / path).glob(f"**/{version or '[0-9]*'}/dataset_info.json")]


def _formats_in(info_file: Path) -> set[str]:
    with contextlib.suppress(OSError, ValueError):
        info = json.loads(info_file.read_bytes())
        return {info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])}
    return set()


def _missing(name: str, data_dir: str) -> DataError:
    root, *_ = roots = _roots(data_dir)
    known = import_tfds().list_builders(with_community_datasets=False)
    base = re.split("[/:]", name)[0]
    copies = [(root, formats) for root in roots if (formats := _formats(root, name))]
    if copies:
        root, formats = copies[0]
        found = " and ".join(sorted(formats))
        copy = f"the copy of the TFDS set {name!r} in {root}"
        what = f"{copy} is in the format {found}, which only TensorFlow reads"
        return UnavailableError(
            f"{what}. Prepare another as array_record, in a folder of its "
            f"own:\n{_recipe(name, root / READABLE)}"
        )
    if base in known:
        what = f"the TFDS set {name!r} has not been prepared in {' or '.join(map(str, roots))}"
        return UnavailableError(f"{what}. To do that, once and anywhere:\n{_recipe(name, root)}")
    close = ", ".join(difflib.get_close_matches(base, [*known, "digits"], 3))
    return DataError(
        f"there is no data set {name!r}{f'; did you mean {close}?' if close else '.'} "
        "Known are digits, cifar10, cifar100 and the sets of "
        "https://www.tensorflow.org/datasets/catalog/overview"
    )


def _recipe(name: str, root: Path) -> str:
    builder = f"tfds.builder({name!r}, data_dir={str(root)!r}, file_format={READABLE!r})"
    prepare = f"{builder}.download_and_prepare()"
    return (
        "    pip install tensorflow tensorflow-datasets array_record importlib_resources\n"
        f'    python -c "import tensorflow_datasets as tfds; {prepare}"\n'
        f"and then --config.data.dir={root}. Only preparing needs TensorFlow; bnjax reads the "
        "result without."
    )
