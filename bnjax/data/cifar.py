"""CIFAR-10 and CIFAR-100 from their official binary files, without TensorFlow and without unpickling anything."""

import dataclasses
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from bnjax.errors import DataError

PIXELS = 32 * 32 * 3
STALL_SECONDS = 10.0  # a download that receives nothing for so long is given up


@dataclasses.dataclass(frozen=True)
class Version:
    """One of the two data sets: its files, and what is known of its contents.

    `train_sums` and `test_sums` are the sums of all red, green and blue values of the official pixels. They follow from the
    per-channel means that are published to 16 digits (0.49139967861519607 for red in CIFAR-10, and so on): times the
    number of pixels and 255 these give whole numbers.
    """

    folder: str
    archive: str
    train_files: tuple[str, ...]
    test_files: tuple[str, ...]
    label_bytes: int  # CIFAR-100 stores a coarse label before the fine one
    classes: int
    class_file: str
    train_sums: tuple[int, int, int]
    test_sums: tuple[int, int, int] | None

    @property
    def url(self) -> str:
        """Where the archive lies; TensorFlow Datasets knows the checksum that belongs to it."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"


VERSIONS = {
    "cifar10": Version(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        test_files=("test_batch.bin",),
        label_bytes=1,
        classes=10,
        class_file="batches.meta.txt",
        train_sums=(6415714204, 6295060180, 5829907619),
        test_sums=(1290492328, 1266775083, 1176108223),
    ),
    "cifar100": Version(
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        train_files=("train.bin",),
        test_files=("test.bin",),
        label_bytes=2,
        classes=100,
        class_file="fine_label_names.txt",
        train_sums=(6620373279, 6352382090, 5756623363),
        test_sums=None,
    ),
}

Split = tuple[np.ndarray, np.ndarray]


def find(version: Version, folders: list[Path]) -> Path | None:
    """Returns the first unpacked folder or archive of this version in the folders, or None."""
    for folder in folders:
        for candidate in (folder if folder.name == version.folder else folder / version.folder, folder / version.archive):
            if candidate.exists():
                return candidate
    return None


def read(version: Version, source: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Returns train and test, each images uint8 [n, 32, 32, 3] and labels int32 [n], and the class names.

    Raises:
        DataError: naming the file that is missing, damaged, of the wrong size, or holds a label out of range.
    """
    names = [*version.train_files, *version.test_files, version.class_file]
    contents = _read_folder(source, names) if source.is_dir() else _read_archive(source, names)
    examples = {name: _examples(version, source, name, contents[name]) for name in names[:-1]}
    train, test = (
        (np.concatenate([examples[name][0] for name in files]), np.concatenate([examples[name][1] for name in files]))
        for files in (version.train_files, version.test_files)
    )
    classes = tuple(contents[version.class_file].decode("ascii", "replace").split())
    if len(classes) != version.classes:
        raise DataError(f"{source / version.class_file} names {len(classes)} classes, not {version.classes}. {_MEND}")
    return train, test, classes


def is_official(version: Version, train: np.ndarray, test: np.ndarray) -> bool:
    """Tells whether the images hold the official pixels, by the sums over each channel."""

    def sums(image: np.ndarray) -> tuple[int, ...]:
        return tuple(int(total) for total in image.sum((0, 1, 2), dtype=np.int64))

    return sums(train) == version.train_sums and version.test_sums in (None, sums(test))


def download(version: Version, cache: Path) -> Path:
    """Returns the archive after downloading it into the cache, checksum verified; nothing partial stays there.

    Raises:
        DataError: when the server cannot be reached, stops sending for 10 s, or sends the wrong bytes.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix="download-", dir=cache))
    except OSError as error:
        raise DataError(f"the cache folder {cache} cannot be written ({error.strerror}); choose another with BNJAX_CACHE.") from error
    try:
        archive = _fetch(version.url, draft)
        return Path(shutil.move(archive, cache / version.archive))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


_MEND = "Fetch the archive again, or remove it so that bnjax downloads it."


def _fetch(url: str, folder: Path) -> str:
    """Runs the download in a process of its own, which can be ended when it stalls; returns the file's path."""
    command = [sys.executable, "-m", "bnjax.data.fetch", url, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONWARNINGS": "ignore"}) as process:
        received, since = -1, time.monotonic()
        try:
            while process.poll() is None:
                time.sleep(0.1)
                size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                if size > received:
                    received, since = size, time.monotonic()
                elif time.monotonic() - since > STALL_SECONDS:
                    raise DataError(f"{url} sent nothing for {STALL_SECONDS:.0f} s ({max(size, 0):,} bytes had come)")
        finally:
            process.kill()
        said = process.stdout.read().strip() if process.stdout else ""
    if process.returncode != 0:
        raise DataError(f"{url} could not be downloaded: {said or 'the download process ended without a word'}")
    return said


def _read_folder(folder: Path, names: list[str]) -> dict[str, bytes]:
    contents = {}
    for name in names:
        try:
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error.strerror}. {_MEND}") from error
    return contents


def _read_archive(path: Path, names: list[str]) -> dict[str, bytes]:
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:  # read in place: nothing is unpacked to the disk
            for member in archive:
                name = member.name.rpartition("/")[2]
                file = archive.extractfile(member) if name in names and member.isfile() else None
                if file is not None:
                    contents[name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"{path} is not a whole tar.gz archive: {error}. {_MEND}") from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise DataError(f"{path} holds no {', '.join(missing)}. {_MEND}")
    return contents


def _examples(version: Version, source: Path, name: str, content: bytes) -> Split:
    width = version.label_bytes + PIXELS
    if not content or len(content) % width:
        raise DataError(f"{source / name} has {len(content):,} bytes, which is not a whole number of {width}-byte examples. {_MEND}")
    rows = np.frombuffer(content, np.uint8).reshape(-1, width)
    label = rows[:, version.label_bytes - 1].astype(np.int32)
    if label.max() >= version.classes:
        wrong = int(label.argmax())
        raise DataError(f"{source / name}: example {wrong} has the label {label[wrong]}, not one of 0 to {version.classes - 1}. {_MEND}")
    image = rows[:, version.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(image), label
