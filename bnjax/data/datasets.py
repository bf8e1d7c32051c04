"""Loads data sets by name, as uint8 arrays or as records on disk."""

import dataclasses
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnjax.data import cifar, tfds
from bnjax.data.pictures import Reading
from bnjax.errors import ConfigError, DataError, UnavailableError, needs

if TYPE_CHECKING:  # at run time this import would be circular
    from bnjax.data.stream import Records

DIGITS = "digits"
RECORDS, FOLDER = "records", "folder"  # the values of data.name for a user's own files


@dataclasses.dataclass(frozen=True)
class Split:
    """Images, uint8 [n, h, w, c], and their labels, int32 [n]."""

    image: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        image, label = self.image, self.label
        if image.dtype != np.uint8 or image.ndim != 4 or len(image) != len(label):
            found = f"images {image.dtype} {image.shape} and labels {label.shape}"
            raise ValueError(f"{found} are not uint8 [n, h, w, c] and [n]")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape [h, w, c] of each image."""
        height, width, channels = self.image.shape[1:]
        return height, width, channels

    def select(self, rows: slice | np.ndarray) -> "Split":
        """Returns the given rows; for a slice, the arrays are views."""
        return Split(self.image[rows], self.label[rows])

    def first(self, examples: int) -> "Split":
        """Returns the first `examples` examples."""
        return self.select(slice(examples))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, in memory or as records on disk.

    Attributes:
        name: the name of the loaded data set; "digits" after a fallback.
        label: the name shown in tables and summaries.
        official: whether the pixels are the published ones; None if unknown.
        train, test: the splits.
        validation: training images held out for validation, or None.
        classes: the class names, in the order of the labels.
        fallback_reason: the reason why the fallback replaced the requested data set, or "".
    """

    name: str
    label: str
    official: bool | None
    train: "Split | Records"
    test: "Split | Records"
    classes: tuple[str, ...]
    fallback_reason: str = ""
    validation: Split | None = None

    @property
    def chosen_by(self) -> tuple[str, "Split | Records"]:
        """The name and the images of the split whose accuracy determines the best checkpoint."""
        return ("test", self.test) if self.validation is None else ("validation", self.validation)


def cache_dir() -> Path:
    """Returns the folder for downloads: $BNJAX_CACHE, or `bnjax` in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("BNJAX_CACHE") or f"{user}/bnjax").expanduser()


def load(
    name: str,
    data_dir: str = "",
    *,
    fallback: str = "",
    label: str = "",
    train_images: int = 0,
    stream: Reading | None = None,
) -> Dataset:
    """Returns the data set with a given name.

    For CIFAR, searches `data_dir`, `cache_dir()` and the array_record copies of TFDS, and downloads
    the data if they are not found.

    Args:
        name: "cifar10", "cifar100", "digits", or any image classification data set in TensorFlow
            Datasets (TFDS). With `stream`: a TFDS data set, "records" for records in `data_dir`, or
            "folder" for images in `data_dir`.
        data_dir: a folder with CIFAR's binary files or archive, TFDS copies, records or images.
        fallback: "digits" to load the digits if the data set is unavailable; "" to raise an error.
        label: the name shown in tables; default: `name`.
        train_images: the number of training images to keep, counted from the first; 0 keeps all. A
            fallback data set keeps all its images.
        stream: the settings for reading images from disk; None loads them into memory. A fallback
            data set is always loaded into memory.

    Raises:
        DataError: if the data are damaged, or unavailable without a fallback.
        ConfigError: if `train_images` exceeds the number of training images.
    """
    if name == DIGITS:
        found = _digits()
    else:
        if data_dir and not Path(data_dir).expanduser().is_dir():
            raise DataError(
                f"config.data.dir = {data_dir!r} cannot be read. It must be a folder that "
                "contains cifar-10-batches-bin, cifar-10-binary.tar.gz, records, or data sets "
                "prepared by TensorFlow Datasets."
            )
        try:
            if stream:
                found = _streamed(name, data_dir, label or name, stream)
            elif name in cifar.VERSIONS:
                found = _cifar(name, data_dir, label or name)
            else:
                found = Dataset(name, label or name, None, *_prepared(name, data_dir))
        except UnavailableError as error:
            if fallback != DIGITS:
                raise
            return dataclasses.replace(_digits(), fallback_reason=str(error))
    if not train_images:
        return found
    if not 0 < train_images <= len(found.train):
        raise ConfigError(
            "data.train_images",
            train_images,
            f"1 up to the {len(found.train)} training images of {found.label}, or 0 for all",
        )
    return dataclasses.replace(
        found,
        label=f"{found.label}, the first {train_images:,} training images",
        train=found.train.first(train_images),
    )


def of_classes(dataset: Dataset, classes: Sequence[int]) -> Dataset:
    """Returns only the images of the given classes; labels and class names are unchanged.

    Raises:
        ConfigError: if a split has no image of one of the classes.

    >>> len(of_classes(load("digits"), (0, 1)).train)
    312
    """
    splits: dict[str, Any] = {}
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        assert isinstance(split, Split)
        if missing := {*classes} - {*split.label.tolist()}:
            allowed = f"numbers of classes with images, 0 to {len(dataset.classes) - 1}"
            raise ConfigError("data.classes", tuple(sorted(missing)), allowed)
        splits[name] = split.select(np.isin(split.label, classes))
    label = f"{dataset.label}, classes {', '.join(map(str, classes))}"
    return dataclasses.replace(dataset, label=label, **splits)


def with_validation(dataset: Dataset, images: int, seed: int) -> Dataset:
    """Holds out training images for validation, from each class in proportion to its size.

    Args:
        dataset: a data set in memory.
        images: the number of images to hold out.
        seed: the seed for selecting images within each class.

    Raises:
        ConfigError: if no training images would be left, or `images` is less than the number of
            classes.

    >>> data = with_validation(load("digits"), 100, seed=0)
    >>> len(data.train), len(data.validation), np.bincount(data.validation.label).tolist()
    (1338, 100, [11, 11, 10, 9, 10, 11, 10, 9, 9, 10])
    """
    train = dataset.train
    assert isinstance(train, Split)
    classes, counts = np.unique(train.label, return_counts=True)
    if not len(classes) <= images < len(train):
        allowed = f"{len(classes)} (one per class) up to {len(train) - 1:,}, or 0 for none"
        raise ConfigError("data.validation", images, allowed)
    exact = counts * images / len(train)
    taken = np.floor(exact).astype(int)
    taken[np.argsort(taken - exact, kind="stable")[: images - taken.sum()]] += 1
    rng, aside = np.random.default_rng(seed), np.zeros(len(train), bool)
    for label, number in zip(classes, taken, strict=True):
        aside[rng.permutation(np.flatnonzero(train.label == label))[:number]] = True
    return dataclasses.replace(dataset, train=train.select(~aside), validation=train.select(aside))


def _digits() -> Dataset:
    """Returns the 1,797 embedded digits as 32x32x3 images; every fifth is a test image.

    The originals have 8x8 pixels with 16 levels. They are the test data of "Optical Recognition of
    Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, CC BY
    4.0).
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        levels, label = file["image"], file["label"].astype(np.int32)
    grey = np.round(levels * (255 / 16)).astype(np.uint8)
    image = np.repeat(np.kron(grey, np.ones((1, 4, 4), np.uint8))[..., None], 3, axis=-1)
    held_out = np.arange(len(label)) % 5 == 4
    train, test = Split(image[~held_out], label[~held_out]), Split(image[held_out], label[held_out])
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return Dataset(DIGITS, DIGITS, True, train, test, names)


def _cifar(name: str, data_dir: str, label: str) -> Dataset:
    version = cifar.VERSIONS[name]
    folders = [Path(folder).expanduser() for folder in (data_dir, cache_dir()) if folder]
    source = next(filter(None, (cifar.find(version, folder) for folder in folders)), None)
    if source is None and tfds.copies(name, data_dir):
        train, test, classes = _prepared(name, data_dir)
    else:
        *arrays, classes = cifar.read(version, source or cifar.download(version, cache_dir()))
        train, test = (Split(*one) for one in arrays)
    official = cifar.is_official(version, train.image, test.image)
    label += "" if official else " (not the official pixels)"
    return Dataset(name, label, official, train, test, classes)


def _prepared(name: str, data_dir: str) -> tuple[Split, Split, tuple[str, ...]]:
    from bnjax.data.stream import open_folder

    train, test, classes = open_folder(tfds.folder(name, data_dir))
    return train.in_memory(), test.in_memory(), classes


def _streamed(name: str, data_dir: str, label: str, reading: Reading) -> Dataset:
    with needs("stream", "config.data.pipeline = 'stream'"):
        importlib.import_module("grain")  # fails before anything is read
    if name in (RECORDS, FOLDER) and not data_dir:
        files = "array_record files" if name == RECORDS else "train/CLASS and test/CLASS"
        raise ConfigError("data.dir", data_dir, f"a folder with {files}")
    from bnjax.data.folder import open_images
    from bnjax.data.stream import open_folder

    folder = Path(data_dir).expanduser()
    if name == FOLDER:
        train, test, classes = open_images(folder, reading)
    else:
        found = folder if name == RECORDS else tfds.folder(name, data_dir)
        train, test, classes = open_folder(found, reading)
    return Dataset(name, label, None, train, test, classes)
