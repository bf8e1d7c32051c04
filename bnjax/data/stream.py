"""Reads images from files on disk, ahead of training, with Grain.

The files are either array_record files, as written by TensorFlow Datasets, or PNG and JPEG files in
one folder per class (`bnjax.data.folder`). Each array_record record is a tf.train.Example with an
`image` (the bytes of a PNG or JPEG file) and a `label` (an integer).
"""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import absl.flags
import numpy as np

from bnjax.data.datasets import Split
from bnjax.data.pictures import UNCHANGED, Reading, read_image
from bnjax.data.tfds import example
from bnjax.errors import DataError, WorkerError, brief
from bnjax.text import progress
from bnjax.types import Batch

FEATURES, LABELS = "features.json", "label.labels.txt"
THREADS = min(8, os.cpu_count() or 1)  # that read ahead; each thread holds one batch
LOST = "terminated unexpectedly"  # part of Grain's error message when a worker dies


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A split on disk; `bnjax.data.datasets.Split` is a split in memory.

    Attributes:
        source: the files. `source[row]` returns the bytes of an image file and its label, and
            `source.where(row)` returns the name of the file for error messages. Each worker process
            receives a copy.
        examples: the number of records in use, counted from the first record.
        image_shape: [h, w, c] of each image after resizing and cropping.
        classes: the number of classes.
        reading: how to read the records.
    """

    source: Any
    examples: int
    image_shape: tuple[int, int, int]
    classes: int
    reading: Reading = UNCHANGED

    def __len__(self) -> int:
        return self.examples

    def first(self, examples: int) -> "Records":
        """Returns the first `examples` examples."""
        return dataclasses.replace(self, examples=examples)

    def select(self, rows: slice | np.ndarray, rngs: Sequence[np.random.Generator] = ()) -> Split:
        """Reads the given rows into memory.

        Args:
            rows: the rows to read.
            rngs: one generator per image for random crops; without generators, crops are centred.

        Raises:
            DataError: if a record is damaged or invalid.
        """
        chosen = np.arange(len(self))[rows]
        image = np.empty((len(chosen), *self.image_shape), np.uint8)
        label = np.empty(len(chosen), np.int32)
        for i, row in enumerate(chosen):
            image[i], label[i] = self._read(int(row), rngs[i] if rngs else None)
        return Split(image, label)

    def in_memory(self) -> Split:
        """Reads all examples into memory, sorted by their `id` if they have this feature.

        For CIFAR this is the order of the original files.
        """
        image = np.empty((len(self), *self.image_shape), np.uint8)
        label, ids = np.empty(len(self), np.int32), []
        for row in progress(range(len(self)), "reading records", "image"):
            image[row], label[row] = self._read(row, None)  # first, to report a damaged record
            ids.append(self.source.features(row).get("id", 0))
        return Split(image, label).select(np.array(sorted(range(len(ids)), key=ids.__getitem__)))

    def _read(self, row: int, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        try:
            file, label = self.source[row]
            opened = read_image(file, self.image_shape[2], self.reading, rng)
            image = np.asarray(opened).reshape(opened.height, opened.width, -1)
        except Exception as error:  # Pillow and array_record raise many error types
            raise DataError(f"{self.source.where(row)} cannot be read: {brief(error)}.") from error
        where = self.source.where(row)
        if image.shape != self.image_shape:
            raise DataError(
                f"the images are not all of one size ({where} is {image.shape}, the first training "
                f"image {self.image_shape}). Resize and crop them with "
                "--config.data.pipeline=stream --config.data.image_size=N."
            )
        if not 0 <= label < self.classes:
            raise DataError(
                f"{where} has the label {label}; labels must be from 0 to {self.classes - 1}."
            )
        return image, label


@dataclasses.dataclass(frozen=True, eq=False)
class _ArrayRecords:
    """The source of a split in array_record files; errors describe `records` as `name`."""

    records: Any
    name: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        found = self.features(row)
        image, label = found.get("image"), found.get("label")
        if not isinstance(image, bytes) or not isinstance(label, int):
            raise ValueError(
                f"it contains {sorted(found) or 'nothing'}, but it must be a tf.train.Example with "
                "an 'image', the bytes of a PNG or JPEG file, and a 'label', an integer"
            )
        return image, label

    def features(self, row: int) -> dict[str, bytes | int]:
        """Returns the first value of each feature that contains bytes or integers."""
        features = example().FromString(bytes(self.records[row])).features.feature
        values = {name: of.bytes_list.value or of.int64_list.value for name, of in features.items()}
        return {name: found[0] for name, found in values.items() if found}

    def where(self, row: int) -> str:
        """Returns the name of a record in error messages."""
        return f"record {row:,} of {self.name}"


def open_folder(
    folder: Path, reading: Reading = UNCHANGED
) -> tuple[Records, Records, tuple[str, ...]]:
    """Returns the train and test splits of a folder of records, and the class names.

    If there is no "test" split, "validation" takes its place.

    Raises:
        DataError: if a split is missing, damaged or incomplete.
    """
    channels, classes = _features(folder)
    files = _files(folder)
    held_out = "test" if files["test"] else "validation"
    if not (files["train"] and files[held_out]):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{folder} has no array_record files of train and test (or validation), but {there}. "
            "Name them like train-00000-of-00010.array_record."
        )
    train, test = (
        _ArrayRecords(_open(files[split]), f"the {split} records in {folder}")
        for split in ("train", held_out)
    )
    return *splits(train, test, len(classes), reading, channels), classes


def splits(
    train: Any, test: Any, classes: int, reading: Reading, channels: int = 3
) -> tuple[Records, Records]:
    """Returns the splits of two sources; the first training image determines the image shape.

    Raises:
        DataError: if that image is damaged.
    """
    try:
        image = read_image(train[0][0], channels)
    except Exception as error:
        raise DataError(f"{train.where(0)} cannot be read: {brief(error)}.") from error
    side = reading.image_size
    shape = (side or image.height, side or image.width, channels)
    first, second = (
        Records(source, len(source), shape, classes, reading) for source in (train, test)
    )
    return first, second


def read_ahead(
    load: Callable[[int], Batch], start: int, stop: int, workers: int
) -> Iterator[Batch]:
    """Yields the batches numbered `start` to `stop` - 1 in order; later ones are loaded meanwhile.

    A batch depends only on its number, so the number of workers does not change it.

    Args:
        load: a picklable function that maps a number to a batch.
        start, stop: the range of numbers.
        workers: the number of processes; 0 for threads of this process.

    Raises:
        WorkerError: if a worker dies.
    """
    import grain

    threads = 0 if workers else THREADS
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches: Any = grain.MapDataset.range(start, stop).map(load).to_iter_dataset(reading)
    if workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags; bnjax does not use them
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(processes, worker_init_fn=_begin_work)
    iterator = iter(batches)
    try:
        for batch in iterator:
            # A copy, because the device may still read a batch after Grain has unmapped the memory
            # that it shares with a worker.
            yield {name: np.array(rows) for name, rows in batch.items()} if workers else batch
    except RuntimeError as error:
        if LOST not in str(error):
            raise
        raise WorkerError(
            f"a data loading process died ({error}). A frequent cause is lack of memory: try fewer "
            "--config.data.workers or a smaller --config.train.batch_size. The same command "
            "resumes from the last checkpoint."
        ) from error
    finally:
        iterator.close()


def _begin_work(index: int, count: int) -> None:
    """Makes a worker process ignore Ctrl-C and end together with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # a normal exit would wait for the parent

    threading.Thread(target=end_with_parent, daemon=True).start()


def _files(folder: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, sorted by name."""
    found: dict[str, list[Path]] = {split: [] for split in ("train", "test", "validation")}
    for path in sorted(folder.glob("*.array_record*")):
        words = re.split("[-_.]", path.name.partition(".array_record")[0])
        if named := [word for word in words if word in found]:
            found[named[-1]].append(path)
    for files in found.values():
        promised = {int(of) for path in files for of in re.findall(r"-of-(\d+)", path.name)}
        if promised and promised != {len(files)}:
            raise DataError(
                f"{folder} has {len(files)} files like {files[0].name}, but their names imply "
                f"{min(promised)}. Copy or prepare them again."
            )
    return found


def _open(files: list[Path]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource([*map(str, files)])
    except Exception as error:
        raise DataError(
            f"{files[0]} (or one of {len(files)} files like it) is not a complete array_record "
            f"file ({brief(error)}). Copy or prepare them again."
        ) from error
    if not len(source):
        raise DataError(f"{files[0]} cannot be read: the files are empty.")
    return source


def _features(folder: Path) -> tuple[int, tuple[str, ...]]:
    """Returns the number of channels of the images, and the class names."""
    labels, features = folder / LABELS, folder / FEATURES
    names = tuple(labels.read_text().split("\n")) if labels.exists() else ()
    names = tuple(name.strip() for name in names if name.strip())
    if not features.exists():
        if not names:
            raise DataError(
                f"{folder} has no description of its records. Name the classes in a file "
                f"{labels}, one per line in the order of their labels."
            )
        return 3, names
    try:
        found = json.loads(features.read_text())["featuresDict"]["features"]
        image, label = found["image"]["image"], found["label"]["classLabel"]
        if image.get("dtype", "uint8") != "uint8":
            raise ValueError(f"its images are {image['dtype']}")
        channels = int(image["shape"]["dimensions"][-1])
        return channels, names or tuple(map(str, range(int(label["numClasses"]))))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{folder} holds no labelled images that bnjax can read ({type(error).__name__}: "
            f"{error}). It needs an 8-bit 'image' and a class as 'label'."
        ) from error
