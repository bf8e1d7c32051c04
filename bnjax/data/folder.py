"""Reads PNG and JPEG files, one folder per class: train/CLASS/*.jpg and test/CLASS/*.jpg."""

import dataclasses
import os
from pathlib import Path

import numpy as np

from bnjax.data.pictures import Reading
from bnjax.data.stream import Records, splits
from bnjax.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png")
HELD_OUT = ("test", "val", "validation")  # the first of these folders that exists is the test split


@dataclasses.dataclass(frozen=True, eq=False)
class _Images:
    """The files of a split; the file `name[row]` (bytes) has the class `label[row]` (int)."""

    folder: Path
    classes: tuple[str, ...]
    name: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, row: int) -> tuple[bytes, int]:
        return Path(self.where(row)).read_bytes(), int(self.label[row])

    def where(self, row: int) -> str:
        """Returns the path of the file."""
        return os.path.join(self.folder, self.classes[self.label[row]], os.fsdecode(self.name[row]))


def open_images(folder: Path, reading: Reading) -> tuple[Records, Records, tuple[str, ...]]:
    """Returns the train and test splits of a folder of images, and the sorted class names.

    The rows begin with the first file of each class, followed by the second file of each class and
    so on, so that the first rows cover all classes.

    Raises:
        DataError: if a split or a class is missing or empty, or the first image is damaged.
    """
    held_out = next((split for split in HELD_OUT if (folder / split).is_dir()), "")
    if not held_out or not (folder / "train").is_dir():
        raise DataError(
            f"{folder} has no folders train and test (or val). Put the images into train/CLASS and "
            "test/CLASS, with a folder for each class."
        )
    classes = tuple(_names(folder / "train", is_folder=True))
    train, test = (_images(folder / split, classes) for split in ("train", held_out))
    return *splits(train, test, len(classes), reading), classes


def _images(folder: Path, classes: tuple[str, ...]) -> _Images:
    if list(classes) != (found := _names(folder, is_folder=True)) or not classes:
        other = sorted({*classes} ^ {*found})[:3]
        raise DataError(
            f"{folder} has {len(found)} class folders, but the training images have "
            f"{len(classes)}. Both need the same{f'; not in both: {other}' if other else ''}."
        )
    files = [_names(folder / name, is_folder=False) for name in classes]
    if empty := [one for one, of_class in zip(classes, files, strict=True) if not of_class]:
        raise DataError(f"{folder / empty[0]} has no files named *{', *'.join(SUFFIXES)}.")
    name = np.array([os.fsencode(file) for of_class in files for file in of_class])
    label = np.repeat(np.arange(len(classes)), [*map(len, files)])
    place = np.concatenate([np.arange(len(of_class)) for of_class in files])
    order = np.lexsort((label, place))
    return _Images(folder, classes, name[order], label[order])


def _names(folder: Path, *, is_folder: bool) -> list[str]:
    """Returns the sorted names of the folders or images in a folder, without hidden ones."""
    with os.scandir(folder) as found:
        return sorted(
            one.name
            for one in found
            if not one.name.startswith(".")
            and (one.is_dir() if is_folder else one.name.lower().endswith(SUFFIXES))
        )
