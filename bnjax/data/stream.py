"""Data sets that stay on disk, as array_record files, and reading them ahead with Grain.

Each record is a tf.train.Example with an `image`, the bytes of a PNG or JPEG file, and a `label`, a
whole number. TensorFlow Datasets writes such folders.
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
THREADS = 2  # that read ahead in this process; each holds a batch
LOST = "terminated unexpectedly"  # Grain's words for a worker that was lost


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        image_size: the side of the square that is cut out of each image; 0: they have one size.
        shorter_side: an image's shorter side is resized to it before, at least `image_size`.
        random_crop: whether the square's place is drawn anew each time that an image is trained on;
            elsewhere the square is in the middle.
        workers: processes that read ahead in training; 0: threads of this one. It changes no
            result.
    """

    image_size: int = 0
    shorter_side: int = 0
    random_crop: bool = False
    workers: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A split that stays on disk; `bnjax.data.datasets.Split` is one in memory.

    Attributes:
        name: its name in errors.
        source: array_record's own, of all its files.
        examples: how many of the records there are, the first ones.
        image_shape: of each image, once it has been made to fit.
        classes: how many there are.
        reading: how they are read.
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
        """Returns the first so many."""
        return dataclasses.replace(self, examples=examples)

    def select(self, rows: slice | np.ndarray, rngs: Sequence[np.random.Generator] = ()) -> Split:
        """Returns some examples, read into memory.

        Args:
            rows: of the examples.
            rngs: draw the place of the square in each image; without them it is in the middle.

        Raises:
            DataError: naming the record that is damaged or not what it has to be.
        """
        chosen = np.arange(len(self))[rows]
        image = np.empty((len(chosen), *self.image_shape), np.uint8)
        label = np.empty(len(chosen), np.int32)
        for i, row in enumerate(chosen):
            image[i], label[i] = self._read(int(row), rngs[i] if rngs else None)
        return Split(image, label)

    def in_memory(self) -> Split:
        """Returns all examples, sorted by their `id` if they have one.

        For CIFAR that is the order of the original files.
        """
        every = self.select(slice(None))  # before the ids: it names a damaged record
        ids = [_parse(self.source[row]).get("id", 0) for row in range(len(self))]
        return every.select(np.array(sorted(range(len(self)), key=ids.__getitem__)))

    def _read(self, row: int, rng: np.random.Generator | None) -> tuple[np.ndarray, int]:
        try:
            opened, label = decode(self.source[row], self.image_shape[2])
            fitted = np.asarray(_square(opened, self.reading, rng))
            image = fitted.reshape(*fitted.shape[:2], -1)
        except Exception as error:  # Pillow and array_record raise a dozen types for damage
            raise _damaged(row, self.name, error) from error
        if image.shape != self.image_shape:
            raise DataError(
                f"the images of {self.name} are not all of one size (record {row:,} is "
                f"{image.shape}, the first of training {self.image_shape}). Say with "
                "--config.data.pipeline=stream --config.data.image_size=N to which they are "
                "resized and cropped."
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
    """Returns train and test of a folder of records, and the classes.

    The test split is "test", or "validation" where there is none.

    Raises:
        DataError: if there are no such splits, or they are damaged or incomplete.
    """
    channels, classes = _features(folder)
    files = _files(folder)
    held_out = "test" if files["test"] else "validation"
    if not (files["train"] and files[held_out]):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{folder} has no array_record files of train and test (or validation), but {there}. "
            "They have to be named like train-00000-of-00010.array_record."
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
    """Yields the batches of numbers from `start` to `stop` in order, loaded ahead of their use.

    The unit of work is a batch, made from its number alone, so the number of workers changes none.

    Args:
        load: (number) -> batch; can be pickled.
        start, stop: the range of numbers.
        workers: processes; 0: threads of this one.

    Raises:
        WorkerError: if a worker is lost.
    """
    import grain

    threads = 0 if workers else THREADS
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches: Any = grain.MapDataset.range(start, stop).map(load).to_iter_dataset(reading)
    if workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # Grain asks them, and this is no program of absl's
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(processes, worker_init_fn=_begin_work)
    iterator = iter(batches)
    try:
        for batch in iterator:
            # Out of the memory shared with a worker, which Grain's arrays unmap when they go: what
            # the device still reads must not hang on that.
            yield {name: np.array(rows) for name, rows in batch.items()} if workers else batch
    except RuntimeError as error:
        if LOST not in str(error):
            raise
        raise WorkerError(
            f"a process that read images ahead was lost ({error}). Often the memory does not "
            "suffice and the system ends one of the processes: try fewer --config.data.workers or "
            "a smaller --config.train.batch_size. The same command goes on from the last "
            "checkpoint."
        ) from error
    finally:
        iterator.close()


def _begin_work(index: int, count: int) -> None:
    """Makes a worker live exactly as long as the training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which ends it
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # what it waits for will never come

    threading.Thread(target=end_with_parent, daemon=True).start()


def decode(record: bytes, channels: int) -> tuple[Image.Image, int]:
    """Returns the image of a record, 8 bits a channel, and its label."""
    found = _parse(record)
    image, label = found.get("image"), found.get("label")
    if not isinstance(image, bytes) or not isinstance(label, int):
        raise ValueError(
            f"it holds {sorted(found) or 'nothing'} and has to be a tf.train.Example with an "
            "'image', the bytes of a PNG or JPEG file, and a 'label', a whole number"
        )
    with Image.open(io.BytesIO(image), formats=("PNG", "JPEG")) as opened:
        return eight_bits(opened, channels), label


def _parse(record: bytes) -> dict[str, bytes | int]:
    """Returns the first value of each feature that has bytes or whole numbers."""
    features = example().FromString(bytes(record)).features.feature
    values = {name: of.bytes_list.value or of.int64_list.value for name, of in features.items()}
    return {name: found[0] for name, found in values.items() if found}


def _square(image: Image.Image, reading: Reading, rng: np.random.Generator | None) -> Image.Image:
    """Returns the square that is cut out of an image, in the middle if `rng` is None."""
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
    """Returns the files of each split, in the order of their names."""
    found: dict[str, list[Path]] = {split: [] for split in ("train", "test", "validation")}
    for path in sorted(folder.glob("*.array_record*")):
        words = re.split("[-_.]", path.name.partition(".array_record")[0])
        if named := [word for word in words if word in found]:
            found[named[-1]].append(path)
    for files in found.values():
        said = {int(of) for path in files for of in re.findall(r"-of-(\d+)", path.name)}
        if said and said != {len(files)}:
            raise DataError(
                f"{folder} has {len(files)} files like {files[0].name}, and not the {min(said)} "
                "that they say they are. Copy or prepare them again."
            )
    return found


def _open(files: list[Path], name: str) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        source = ArrayRecordDataSource([*map(str, files)])
    except Exception as error:
        raise DataError(
            f"{files[0]} or another of its {len(files)} files is no whole array_record file "
            f"({brief(error)}). Copy or prepare them again."
        ) from error
    if not len(source):
        raise DataError(f"there are none of {name}: the files are empty.")
    return source


def _features(folder: Path) -> tuple[int, tuple[str, ...]]:
    """Returns how many channels the images have, and the classes."""
    labels, features = folder / LABELS, folder / FEATURES
    names = tuple(labels.read_text().split("\n")) if labels.exists() else ()
    names = tuple(name.strip() for name in names if name.strip())
    if not features.exists():
        if not names:
            raise DataError(
                f"{folder} does not say what its records are. Name the classes in a file "
                f"{labels}, one a line in the order of their labels."
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
            f"{error}). It needs an 'image' of 8 bits and a 'label' that is a class."
        ) from error
