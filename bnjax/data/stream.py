"""Reads data sets from array_record files on disk, ahead of training, with Grain.

Each record is a tf.train.Example with an `image`, the bytes of a PNG or JPEG file, and a `label`,
an integer, as written by TensorFlow Datasets.
"""

import dataclasses
import io
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
from PIL import Image

from bnjax.data.datasets import Split
from bnjax.data.pictures import eight_bits
from bnjax.data.tfds import example
from bnjax.errors import DataError, WorkerError, brief
from bnjax.types import Batch

FEATURES, LABELS = "features.json", "label.labels.txt"
THREADS = 2  # read ahead in this process; each holds a batch
LOST = "terminated unexpectedly"  # in Grain's error when a worker dies


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        image_size: the side of the square crop; 0: no crop, all images have the same size.
        shorter_side: the shorter side after resizing, before the crop; at least `image_size`.
        random_crop: whether training uses random crops; otherwise the crop is centred.
        workers: the number of processes that read ahead in training; 0: threads of this process.
            The results are the same.
    """

    image_size: int = 0
    shorter_side: int = 0
    random_crop: bool = False
    workers: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A split on disk; `bnjax.data.datasets.Split` is a split in memory.

    Attributes:
        name: its name in errors.
        source: the `ArrayRecordDataSource` of all its files.
        examples: the number of records in use, the first ones.
        image_shape: [h, w, c] of each image after resizing and cropping.
        classes: the number of classes.
        reading: how to read the records.
    """

    name: str
    source: Any
    examples: int
    image_shape: tuple[int, int, int]
    classes: int
    reading: Reading = Reading()

    def __len__(self) -> int:
        return self.examples

    def first(self, examples: int) -> "Records":
        """Returns the first examples."""
        return dataclasses.replace(self, examples=examples)

    def select(self, rows: slice | np.ndarray, rngs: Sequence[np.random.Generator] = ()) -> Split:
        """Reads the given rows into memory.

        Args:
            rows: the rows to read.
            rngs: one generator per image for random crops; without them the crop is centred.

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
        """Reads all examples, sorted by `id` if they have one.

        For CIFAR this is the order of the original files.
        """
        every = self.select(slice(None))  # before the ids: its error reports a damaged record
        ids = [_parse(self.source[row]).get("id", 0) for row in range(len(self))]
        return every.select(np.array(sorted(range(len(self)), key=ids.__getitem__)))

    def _read(self, row: int, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        try:
            opened, label = decode(self.source[row], self.image_shape[2])
            fitted = np.asarray(_square(opened, self.reading, rng))
            image = fitted.reshape(*fitted.shape[:2], -1)
        except Exception as error:  # Pillow and array_record raise many types
            raise _damaged(row, self.name, error) from error
        if image.shape != self.image_shape:
            raise DataError(
                f"the images of {self.name} are not all of one size (record {row:,} is "
                f"{image.shape}, the first training image {self.image_shape}). Resize and crop "
                "them with --config.data.pipeline=stream --config.data.image_size=N."
            )
        if not 0 <= label < self.classes:
            raise DataError(
                f"record {row:,} of {self.name} has the label {label}; labels have to be from 0 to "
                f"{self.classes - 1}."
            )
        return image, label


def open_folder(
    folder: Path, reading: Reading = Reading()
) -> tuple[Records, Records, tuple[str, ...]]:
    """Returns the train and test splits of a folder of records, and the classes.

    Without a "test" split, "validation" is used.

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
    named = {split: f"the {split} records in {folder}" for split in ("train", held_out)}
    sources = {split: _open(files[split], name) for split, name in named.items()}
    try:
        image, _ = decode(sources["train"][0], channels)
    except Exception as error:
        raise _damaged(0, named["train"], error) from error
    side = reading.image_size
    shape = (side or image.height, side or image.width, channels)
    train, test = (
        Records(name, sources[split], len(sources[split]), shape, len(classes), reading)
        for split, name in named.items()
    )
    return train, test, classes


def read_ahead(
    load: Callable[[int], Batch], start: int, stop: int, workers: int
) -> Iterator[Batch]:
    """Yields the batches with numbers from `start` to `stop` in order, loaded in advance.

    A batch depends only on its number, so the number of workers does not change it.

    Args:
        load: (number) -> batch; can be pickled.
        start, stop: the range of numbers.
        workers: the number of processes; 0: threads of this process.

    Raises:
        WorkerError: if a worker dies.
    """
    import grain

    threads = 0 if workers else THREADS
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches: Any = grain.MapDataset.range(start, stop).map(load).to_iter_dataset(reading)
    if workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # Grain reads them; bnjax does not use absl's app
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # a normal exit would wait for the parent

    threading.Thread(target=end_with_parent, daemon=True).start()


def decode(record: bytes, channels: int) -> tuple[Image.Image, int]:
    """Returns the image of a record, with 8 bits per channel, and its label."""
    found = _parse(record)
    image, label = found.get("image"), found.get("label")
    if not isinstance(image, bytes) or not isinstance(label, int):
        raise ValueError(
            f"it contains {sorted(found) or 'nothing'} and has to be a tf.train.Example with an "
            "'image', the bytes of a PNG or JPEG file, and a 'label', an integer"
        )
    with Image.open(io.BytesIO(image), formats=("PNG", "JPEG")) as opened:
        return eight_bits(opened, channels), label


def _parse(record: bytes) -> dict[str, bytes | int]:
    """Returns the first value of each feature of bytes or integers."""
    features = example().FromString(bytes(record)).features.feature
    values = {name: of.bytes_list.value or of.int64_list.value for name, of in features.items()}
    return {name: found[0] for name, found in values.items() if found}


def _square(image: Image.Image, reading: Reading, rng: np.random.Generator | None) -> Image.Image:
    """Returns the square crop of a resized image, centred if `rng` is None."""
    if not reading.image_size:
        return image
    shorter = reading.shorter_side or reading.image_size
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(side * scale)) for side in image.size)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    room = (width - reading.image_size, height - reading.image_size)
    left, top = (each // 2 if rng is None else int(rng.integers(each + 1)) for each in room)
    return resized.crop((left, top, left + reading.image_size, top + reading.image_size))


def _damaged(row: int, name: str, error: Exception) -> DataError:
    return DataError(f"record {row:,} of {name} cannot be read: {brief(error)}.")


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
                f"{folder} has {len(files)} files like {files[0].name}, but their names promise "
                f"{min(promised)}. Copy or prepare them again."
            )
    return found


def _open(files: list[Path], name: str) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource([*map(str, files)])
    except Exception as error:
        raise DataError(
            f"{files[0]} (or one of {len(files)} files like it) is not a complete array_record "
            f"file ({brief(error)}). Copy or prepare them again."
        ) from error
    if not len(source):
        raise DataError(f"{name} cannot be read: the files are empty.")
    return source


def _features(folder: Path) -> tuple[int, tuple[str, ...]]:
    """Returns the number of channels of the images, and the classes."""
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
