"""Finds image classification data sets prepared by TensorFlow Datasets, without TensorFlow."""

import contextlib
import difflib
import functools
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from bnjax.errors import DataError, UnavailableError
from bnjax.quiet import drop_logs

READABLE = "array_record"  # the only TFDS file format that is readable without TensorFlow


def import_tfds() -> ModuleType:
    """Imports and returns `tensorflow_datasets`, only when needed, because the import is slow."""
    drop_logs("tensorflow_datasets")
    import tensorflow_datasets

    return tensorflow_datasets


@functools.cache
def example() -> Any:
    """Returns TFDS's class for tf.train.Example; importing the class takes 0.4 s."""
    import_tfds()
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def copies(name: str, data_dir: str) -> list[Path]:
    """Returns the folders of a data set's readable copies, from the first root that has any.

    Args:
        name: the TFDS name, optionally with a config and a version.
        data_dir: a folder to search before the default folder of TFDS.
    """
    found = (
        [one for one, readable in _copies(root, name) if readable] for root in _roots(data_dir)
    )
    return next(filter(None, found), [])


def folder(name: str, data_dir: str) -> Path:
    """Returns the folder of the newest readable copy of a data set; see `copies` for arguments.

    Raises:
        UnavailableError: if no copy is readable without TensorFlow.
        DataError: if the data set is unknown or has several configs.
    """
    readable = copies(name, data_dir)
    if not readable:
        raise _missing(name, data_dir)
    if len({copy.parent for copy in readable}) > 1:
        configs = sorted({f"{copy.parent.parent.name}/{copy.parent.name}" for copy in readable})
        raise DataError(
            f"the TFDS data set {name!r} has several configs. Choose one: {', '.join(configs)}."
        )
    return max(readable, key=lambda copy: [*map(int, re.findall(r"\d+", copy.name))])


def _roots(data_dir: str) -> list[Path]:
    default = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return [Path(root).expanduser() for root in (data_dir, default) if root]


def _copies(root: Path, name: str) -> list[tuple[Path, bool]]:
    """Returns the folders of all copies of a data set, and whether each copy is readable."""
    path, _, version = name.partition(":")
    found = []
    for file in (root / path).glob(f"**/{version or '[0-9]*'}/dataset_info.json"):
        with contextlib.suppress(OSError, ValueError):
            info = json.loads(file.read_bytes())
            formats = [info.get("fileFormat"), *info.get("alternativeFileFormats", [])]
            found.append((file.parent, READABLE in formats))
    return found


def _missing(name: str, data_dir: str) -> DataError:
    roots = _roots(data_dir)
    known = import_tfds().list_builders(with_community_datasets=False)
    base = re.split("[/:]", name)[0]
    if base not in known:
        close = ", ".join(difflib.get_close_matches(base, [*known, "digits"], 3))
        return DataError(
            f"there is no data set {name!r}{f'; did you mean {close}?' if close else '.'} "
            "Allowed: digits, cifar10, cifar100 and the data sets of "
            "https://www.tensorflow.org/datasets/catalog/overview"
        )
    root, what = roots[0], f"has not been prepared in {' or '.join(map(str, roots))}"
    for one in roots:
        if _copies(one, name):  # TFDS cannot prepare a second format in the same folder
            root, what = one / READABLE, f"in {one} is in a format that only TensorFlow reads"
    builder = f"tfds.builder({name!r}, data_dir={str(root)!r}, file_format={READABLE!r})"
    prepare = f"{builder}.download_and_prepare()"
    return UnavailableError(
        f"the TFDS data set {name!r} {what}. Prepare it once, on any machine:\n"
        "    pip install tensorflow tensorflow-datasets array_record importlib_resources\n"
        f'    python -c "import tensorflow_datasets as tfds; {prepare}"\n'
        f"and then add --config.data.dir={root}. bnjax reads the result without TensorFlow."
    )
