"""Data sets that stay on disk, as array_record files: the records and their examples."""

import dataclasses
import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bnjax.data.datasets import Split
from bnjax.data.pictures import eight_bits
from bnjax.data.tfds import import_tfds
from bnjax.errors import DataError


@functools.cache
def _example() -> Any:
    """Returns the class of tf.train.Example that TFDS brings, imported late: it takes 0.4 s."""
    import_tfds()
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


def encode(image: bytes, label: int) -> bytes:
    """Returns a tf.train.Example of an image, the bytes of a PNG or JPEG file, and its label.

    >>> decode(encode(b"PNG", 300))
    {'image': b'PNG', 'label': 300}
    """
    example = _example()()
    example.features.feature["image"].bytes_list.value.append(image)
    example.features.feature["label"].int64_list.value.append(label)
    return example.SerializeToString(deterministic=True)


def decode(message: bytes) -> dict[str, bytes | int]:
    """Returns the first value of each feature of a tf.train.Example with bytes or whole numbers.

    Raises:
        ValueError: if it is no such message.
    """
    from google.protobuf.message import DecodeError

    try:
        features = _example().FromString(bytes(message)).features.feature
    except DecodeError as error:
        raise ValueError("it is no tf.train.Example") from error
    values = {
        name: of.bytes_list.value or of.int64_list.value for name, of in sorted(features.items())
    }
    return {name: found[0] for name, found in values.items() if found}


FEATURES, LABELS = "features.json", "label.labels.txt"
SPLITS = ("train", "test", "validation")


@dataclasses.dataclass(frozen=True)
class Crop:
    """How images of different sizes become squares.

    Attributes:
        side: of the square that is cut out.
        shorter: what an image's shorter side is resized to before, at least `side`.
        at_random: whether each time that an image is trained on a place is drawn; elsewhere the
            square is the one in the middle.
    """

    side: int
    shorter: int
    at_random: bool = False

    def __call__(self, image: Image.Image, rng: np.random.Generator | None) -> Image.Image:
        """Returns the square, in the middle if `rng` is None."""
        scale = self.shorter / min(image.size)
        size = [max(self.shorter, round(side * scale)) for side in image.size]
        resized = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        room = [side - self.side for side in size]
        left, top = [each // 2 if rng is None else int(rng.integers(each + 1)) for each in room]
        return resized.crop((left, top, left + self.side, top + self.side))


@dataclasses.dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        crop: how images are made to fit; None: they all have one size.
        workers: processes that read ahead in training; 0: threads of this one. It changes no
            result.
    """

    crop: Crop | None = None
    workers: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A split that stays on disk; `bnjax.data.datasets.Split` is one in memory.

    Attributes:
        name: what errors call it.
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

    def select(self, rows: slice | np.ndarray) -> Split:
        """Returns some examples, read into memory; of each the square in the middle."""
        chosen = np.arange(len(self))[rows]
        image = np.empty((len(chosen), *self.image_shape), np.uint8)
        label = np.empty(len(chosen), np.int32)
        for i, row in enumerate(chosen):
            image[i], label[i] = self.read(int(row))
        return Split(image, label)

    def read(self, row: int, rng: np.random.Generator | None = None) -> tuple[np.ndarray, int]:
        """Returns the image of a record, uint8 [h, w, c], and its label.

        Args:
            row: of the record.
            rng: draws the place of the square; None: it is the one in the middle.

        Raises:
            DataError: naming the record, if it is damaged or not what it has to be.
        """
        try:
            image, label = _parse(self.source[row], self.image_shape[2])
            crop = self.reading.crop
            found = _pixels(crop(image, rng) if crop else image)
        except Exception as error:  # Pillow and array_record raise a dozen types for damage
            raise _damaged(row, self.name, error) from error
        if found.shape != self.image_shape:
            raise DataError(
                f"the images of {self.name} are not all of one size (record {row:,} is "
                f"{found.shape}, the first {self.image_shape}). Say with "
                "--config.data.image_size=N to which they are resized and cropped."
            )
        if not 0 <= label < self.classes:
            raise DataError(
                f"record {row:,} of {self.name} has the label {label}; labels have to be from 0 to "
                f"{self.classes - 1}."
            )
        return found, label


Examples = Split | Records


def open_folder(
    folder: Path, reading: Reading = Reading()
) -> tuple[Records, Records, tuple[str, ...]]:
    """Returns train and test of a folder of records, and the classes.

    The test split is "test", or "validation" where there is none.

    Raises:
        DataError: if there are no such splits, or they are damaged or incomplete.
    """
    crop = reading.crop
    channels, classes = _features(folder)
    files = _files(folder)
    held_out = "test" if files["test"] else "validation"
    if not (files["train"] and files[held_out]):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise DataError(
            f"{folder} has no array_record files of train and test (or validation), but {there}. "
            "They have to be named like train-00000-of-00010.array_record."
        )
    opened = []
    for split in ("train", held_out):
        name, source = f"the {split} records in {folder}", _open(files[split])
        if not len(source):
            raise DataError(f"there are none of {name}: the files are empty.")
        try:
            image, _ = _parse(source[0], channels)
        except Exception as error:
            raise _damaged(0, name, error) from error
        height, width = (crop.side, crop.side) if crop else (image.height, image.width)
        shape = (height, width, channels)
        opened.append(Records(name, source, len(source), shape, len(classes), reading))
    train, test = opened
    if train.image_shape != test.image_shape:
        raise DataError(
            f"the images of the splits in {folder} are of the sizes {train.image_shape} and "
            f"{test.image_shape}. Say with --config.data.image_size=N to which they are resized "
            "and cropped."
        )
    return train, test, classes


def _damaged(row: int, name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return DataError(f"record {row:,} of {name} cannot be read: {reason.rstrip('.')}.")


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(image.height, image.width, -1)


def _parse(record: bytes, channels: int) -> tuple[Image.Image, int]:
    """Returns the image and the label of a record."""
    found = decode(record)
    image, label = found.get("image"), found.get("label")
    if not isinstance(image, bytes) or not isinstance(label, int):
        raise ValueError(
            f"it holds {sorted(found) or 'nothing'} and has to be a tf.train.Example with an "
            "'image', the bytes of a PNG or JPEG file, and a 'label', a whole number"
        )
    with Image.open(io.BytesIO(image), formats=("PNG", "JPEG")) as opened:
        return eight_bits(opened, channels), label


def _files(folder: Path) -> dict[str, list[Path]]:
    """Returns the files of each split, in the order of their names."""
    found: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in sorted(folder.glob("*.array_record*")):
        words = re.split("[-_.]", path.name.partition(".array_record")[0])
        if named := [word for word in words if word in found]:
            found[named[-1]].append(path)
    for files in found.values():
        of = {match[1] for path in files if (match := re.search(r"-of-(\d+)", path.name))}
        if of and of != {f"{len(files):0{len(next(iter(of)))}d}"}:
            raise DataError(
                f"{folder} has {len(files)} files like {files[0].name}, and not the {min(of)} that "
                "they say they are. Copy or prepare them again."
            )
    return found


def _open(files: list[Path]) -> Any:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource([*map(str, files)])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{files[0]} or another of its {len(files)} files is no whole array_record file "
            f"({reason})."
        ) from error


def _features(folder: Path) -> tuple[int, tuple[str, ...]]:
    """Returns how many channels the images have, and the classes."""
    try:
        labels, features = folder / LABELS, folder / FEATURES
        lines = labels.read_text().splitlines() if labels.exists() else []
        names = tuple(line.strip() for line in lines if line.strip())
        if not features.exists():
            if not names:
                raise DataError(
                    f"{folder} does not say what its records are. Name the classes in a file "
                    f"{folder / LABELS}, one a line in the order of their labels."
                )
            return 3, names
        of = json.loads(features.read_text())["featuresDict"]["features"]
        image, label = of["image"]["image"], of["label"]["classLabel"]
        if image.get("dtype", "uint8") != "uint8":
            raise ValueError(f"its images are {image['dtype']}")
        channels = int(image["shape"]["dimensions"][-1])
        return channels, names or tuple(map(str, range(int(label["numClasses"]))))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{folder} holds no labelled images that bnjax can read ({type(error).__name__}: "
            f"{error}). It needs an 'image' of 8 bits and a 'label' that is a class."
        ) from error
