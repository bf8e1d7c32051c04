"""Named data sets become uint8 arrays."""

import dataclasses
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bnjax.data import cifar, tfds
from bnjax.errors import ConfigError, DataError, UnavailableError, UserError

if TYPE_CHECKING:  # they need what is here
    from bnjax.data.records import Reading, Records

DIGITS = "digits"
RECORDS = "records"
STALL_SECONDS = 10.0  # a download that receives nothing for so long is given up


@dataclasses.dataclass(frozen=True)
class Split:
    """Images uint8 [n, h, w, c] and their labels int32 [n]."""

    image: np.ndarray
    label: np.ndarray

    def __post_init__(self) -> None:
        if (
            self.image.dtype != np.uint8
            or self.image.ndim != 4
            or len(self.image) != len(self.label)
        ):
            found = f"images {self.image.dtype} {self.image.shape} and labels {self.label.shape}"
            raise ValueError(f"{found} are not uint8 [n, h, w, c] and [n]")

    def __len__(self) -> int:
        return len(self.label)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[h, w, c] of each image."""
        height, width, channels = self.image.shape[1:]
        return height, width, channels

    def select(self, rows: slice | np.ndarray) -> "Split":
        """Returns some examples; those of a slice are not copied."""
        return Split(self.image[rows], self.label[rows])

    def first(self, examples: int) -> "Split":
        """Returns the first so many."""
        return self.select(slice(examples))


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set, in memory or, as records, on disk.

    Attributes:
        name: what was loaded: after a fallback another one than was asked for.
        label: what tables and summaries call it.
        official: whether its pixels are known to be the published ones; None where bnjax has
            nothing to compare with.
        fallback_reason: why this set stands in for the one that was asked for; empty if it does
            not.
    """

    name: str
    label: str
    official: bool | None
    train: "Split | Records"
    test: "Split | Records"
    classes: tuple[str, ...]
    fallback_reason: str = ""


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
    stream: "Reading | None" = None,
) -> Dataset:
    """Returns a data set by name.

    CIFAR is looked for in `data_dir`, then in `cache_dir()`, then as an array_record copy of TFDS,
    and at last downloaded.

    Args:
        name: "cifar10", "cifar100", "digits", or any image classification set of TensorFlow
            Datasets; with `stream`, of the latter only, or "records", the ones in `data_dir`.
        data_dir: a folder that holds CIFAR's binary files or archive, or TFDS's copies.
        fallback: "digits" to use those where the set cannot be had; "" to raise.
        label: what to call the data in tables instead of its name.
        train_images: how many of the training images to keep, the first ones, and 0 for all; a
            fallback keeps all.
        stream: leaves the images on disk, as records, to be read in this way; a fallback is in
            memory.

    Raises:
        DataError: if the data cannot be had and there is no fallback, or are damaged (no fallback
            hides damage).
        ConfigError: if there are fewer training images than are wanted.
    """
    if name != DIGITS and data_dir:
        _check_folder(data_dir)
    try:
        found = (
            _streamed(name, data_dir, label, stream) if stream else _named(name, data_dir, label)
        )
    except UnavailableError as error:
        if fallback != DIGITS:
            raise
        return dataclasses.replace(_digits(), fallback_reason=str(error))
    return _first(found, train_images) if train_images else found


def _named(name: str, data_dir: str, label: str) -> Dataset:
    if name == DIGITS:
        return _digits()
    version = cifar.VERSIONS.get(name)
    train, test, classes = (_cifar if version else tfds.read)(name, data_dir)
    official = cifar.is_official(version, train[0], test[0]) if version else None
    label = (label or name) + (" (not the official pixels)" if official is False else "")
    return Dataset(name, label, official, Split(*train), Split(*test), classes)


def _streamed(name: str, data_dir: str, label: str, reading: "Reading") -> Dataset:
    from bnjax.data import records

    if importlib.util.find_spec("grain") is None:
        raise UserError(
            "config.data.pipeline = 'stream' needs Grain, which is not installed. Install it with: "
            "pip install 'bnjax[stream]'."
        )
    if name == RECORDS and not data_dir:
        raise ConfigError("data.dir", data_dir, "a folder with array_record files")
    folder = Path(data_dir).expanduser() if name == RECORDS else tfds.folder(name, data_dir)
    train, test, classes = records.open_folder(folder, reading)
    return Dataset(name, label or name, None, train, test, classes)


def _first(dataset: Dataset, images: int) -> Dataset:
    train = dataset.train
    if not 0 < images <= len(train):
        raise ConfigError(
            "data.train_images",
            images,
            f"1 up to the {len(train)} training images of {dataset.label}, or 0 for all",
        )
    label = f"{dataset.label}, the first {images:,} training images"
    return dataclasses.replace(dataset, label=label, train=train.first(images))


def _check_folder(data_dir: str) -> None:
    try:
        os.listdir(Path(data_dir).expanduser())
    except OSError as error:
        raise DataError(
            f"config.data.dir = {data_dir!r} cannot be read: {error.strerror}. It has to be a "
            "folder, the one that holds "
            "cifar-10-batches-bin or cifar-10-binary.tar.gz or that TensorFlow Datasets prepared."
        ) from error


def _cifar(name: str, data_dir: str) -> tuple[cifar.Split, cifar.Split, tuple[str, ...]]:
    version = cifar.VERSIONS[name]
    folders = [*([Path(data_dir).expanduser()] if data_dir else []), cache_dir()]
    source = next(filter(None, (cifar.find(version, folder) for folder in folders)), None)
    if source is None and tfds.find(name, data_dir):
        return tfds.read(name, data_dir)
    return cifar.read(version, source or _download(name, version.archive, data_dir))


def _download(name: str, archive: cifar.Archive, data_dir: str) -> Path:
    """Returns an archive in the cache folder, where it appears whole and verified or not at all."""
    import pooch
    import requests

    cache = cache_dir()
    pooch.get_logger().setLevel(logging.WARNING)
    downloader = pooch.HTTPDownloader(timeout=STALL_SECONDS, progressbar=sys.stderr.isatty())
    try:
        return Path(
            pooch.retrieve(
                archive.url, f"sha256:{archive.sha256}", archive.name, cache, downloader=downloader
            )
        )
    except requests.RequestException as error:
        reason = f"{archive.url} could not be downloaded ({type(error).__name__})"
    except ValueError:
        reason = f"{archive.url} sent another file: its checksum is not the official one"
    except OSError as error:
        reason = f"the cache folder {cache} cannot be written ({error.strerror or error})"
    where = f"in {data_dir}, nor elsewhere on this machine" if data_dir else "on this machine"
    raise UnavailableError(
        f"{name} is not {where}, and {reason}. To mend that, fetch {archive.url} where there is a "
        "network, put it into a folder, and add --config.data.dir=FOLDER."
    )


def _digits() -> Dataset:
    """Returns the 1,797 embedded digits as 32x32x3; every fifth is for testing.

    8x8 images with 16 levels: "Optical Recognition of Handwritten Digits" (E. Alpaydin and
    C. Kaynak, UCI Machine Learning Repository, 1998, CC BY 4.0), its test set.
    """
    with np.load(Path(__file__).with_name("digits.npz")) as file:
        levels, label = file["image"], file["label"].astype(np.int32)
    grey = np.round(levels * (255 / 16)).astype(np.uint8)
    image = np.repeat(np.kron(grey, np.ones((1, 4, 4), np.uint8))[..., None], 3, axis=-1)
    held_out = np.arange(len(label)) % 5 == 4
    train, test = Split(image[~held_out], label[~held_out]), Split(image[held_out], label[held_out])
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    return Dataset(DIGITS, DIGITS, True, train, test, names)
