"""Reads images from files on disk, ahead of training, with Grain.

The files are either array_record files, as written by TensorFlow Datasets, or PNG and JPEG files in
one folder per class (`bnjax.data.folder`). Each array_record record is a tf.train.Example with an
`image` (the bytes of a PNG or JPEG file) and a `label` (an integer).
"""

import dataclasses
import io
import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import absl.flags
import numpy as np
from PIL import ExifTags, Image

from bnjax.data.datasets import Split
from bnjax.data.pictures import eight_bits
from bnjax.data.tfds import example
from bnjax.errors import DataError, WorkerError, brief
from bnjax.text import progress
from bnjax.types import Batch

FEATURES, LABELS = "features.json", "label.labels.txt"
THREADS = min(8, os.cpu_count() or 1)  # that read ahead; each thread holds one batch
LOST = "terminated unexpectedly"  # part of Grain's error message when a worker dies
Box = tuple[int, int, int, int]  # left, upper, right and lower edge in pixels


@dataclasses.dataclass(frozen=True)
class Reading:
    """Settings for reading records.

    Attributes:
        image_size: the side of the square crop; 0 for no crop, which requires images of equal size.
        shorter_side: the shorter side after resizing, before the crop; at least `image_size`.
        crop: the crop of training images; other images are cropped in the centre. "random": a
            square at a random position in the resized image; "random_resized": a random box of the
            original image, resized.
        workers: the number of processes that read ahead in training; 0 for threads of this process.
            The images do not depend on this number.
    """

    image_size: int = 0
    shorter_side: int = 0
    crop: Literal["centre", "random", "random_resized"] = "centre"
    workers: int = 0


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
    reading: Reading = Reading()

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
    folder: Path, reading: Reading = Reading()
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


def read_image(
    file: bytes,
    channels: int,
    reading: Reading = Reading(),
    rng: np.random.Generator | None = None,
) -> Image.Image:
    """Returns an upright image with 8 bits per channel, resized and cropped.

    JPEG files much larger than needed are decoded at 1/2, 1/4 or 1/8 of their size, never below
    the size after resizing. Resizing is bilinear, with antialiasing.

    Args:
        file: the bytes of a PNG or JPEG file.
        channels: the number of channels.
        reading: the settings for resizing and cropping.
        rng: the generator for a random crop; None for a centred crop.
    """
    with Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as opened:
        image: Image.Image = opened
        side = reading.image_size
        if not side:
            return eight_bits(image, channels)
        if image.getexif().get(ExifTags.Base.Orientation, 1) > 1:
            image = eight_bits(image, channels)  # decodes it whole: `draft` has no effect
        width, height = image.size
        if rng is not None and reading.crop == "random_resized":
            box, size = random_box(width, height, rng), (side, side)
        else:
            shorter = reading.shorter_side or side
            scale = shorter / min(width, height)
            box = (0, 0, width, height)
            size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
        reduction = max(1.0, min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]))
        least = (math.ceil(width / reduction), math.ceil(height / reduction))
        drafted = image.draft(None, least)  # None if the file is not a JPEG file
        share = drafted[1][2] / width if drafted else 1.0
        whole = eight_bits(image, channels)
    left, upper, right, lower = (share * edge for edge in box)
    resized = whole.resize(size, Image.Resampling.BILINEAR, box=(left, upper, right, lower))
    room = (size[0] - side, size[1] - side)
    x, y = (each // 2 if rng is None else int(rng.integers(each + 1)) for each in room)
    return resized.crop((x, y, x + side, y + side))


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Returns a random box with 8 to 100 % of the area and an aspect ratio from 3/4 to 4/3.

    The area is uniformly and the aspect ratio log-uniformly distributed. If ten random boxes in a
    row do not fit into the image, the result is the largest centred box with an allowed aspect
    ratio. (Szegedy et al., Going deeper with convolutions, 2015; as in torchvision.)

    >>> random_box(300, 200, np.random.default_rng(0))
    (39, 84, 112, 181)
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = (4 / 3) ** rng.uniform(-1, 1)
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, upper = (int(rng.integers(room + 1)) for room in (width - across, height - down))
            break
    else:
        across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, upper = (width - across) // 2, (height - down) // 2
    return left, upper, left + across, upper + down


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
