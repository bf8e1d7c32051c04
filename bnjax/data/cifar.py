"""CIFAR-10 and CIFAR-100 from their official binary files; nothing is unpickled."""

import dataclasses
import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from bnjax.errors import DataError

PIXELS = 32 * 32 * 3
CLASS_FILE_BYTES = 1 << 14  # far more than the names of a hundred classes take

Split = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Archive:
    """An archive on a server, and its checksum."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Version:
    """One of the two data sets: its files, and what is known of its contents.

    `train_sums` and `test_sums` are the sums of all red, green and blue values of the official
    pixels. They follow from the per-channel means that are published to 16 digits
    (0.49139967861519607 for red in CIFAR-10, and so on): times the number of pixels and 255 these
    give whole numbers.
    """

    archive: Archive
    folder: str
    train_files: dict[str, int]  # with the number of examples in each
    test_files: dict[str, int]
    label_bytes: int  # CIFAR-100 stores a coarse label before the fine one
    classes: int
    class_file: str
    train_sums: tuple[int, int, int]
    test_sums: tuple[int, int, int] | None

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each file of examples."""
        return {
            name: examples * (self.label_bytes + PIXELS)
            for name, examples in (self.train_files | self.test_files).items()
        }


VERSIONS = {
    "cifar10": Version(
        archive=Archive(
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
        folder="cifar-10-batches-bin",
        train_files={f"data_batch_{i}.bin": 10_000 for i in range(1, 6)},
        test_files={"test_batch.bin": 10_000},
        label_bytes=1,
        classes=10,
        class_file="batches.meta.txt",
        train_sums=(6415714204, 6295060180, 5829907619),
        test_sums=(1290492328, 1266775083, 1176108223),
    ),
    "cifar100": Version(
        archive=Archive(
            url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
        folder="cifar-100-binary",
        train_files={"train.bin": 50_000},
        test_files={"test.bin": 10_000},
        label_bytes=2,
        classes=100,
        class_file="fine_label_names.txt",
        train_sums=(6620373279, 6352382090, 5756623363),
        test_sums=None,
    ),
}


def find(version: Version, folder: Path) -> Path | None:
    """Returns the unpacked folder of this version (perhaps the folder itself) or its archive."""
    itself = Path(os.path.abspath(folder))  # "." has no name
    for candidate in (
        itself if itself.name == version.folder else folder / version.folder,
        folder / version.archive.name,
    ):
        if os.path.lexists(candidate):
            return candidate
    return None


def read(version: Version, source: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """Returns train and test, images uint8 [n, 32, 32, 3] and labels int32 [n], and the classes.

    Raises:
        DataError: naming the file that is missing, damaged, of the wrong size, or holds a label out
            of range.
    """
    contents = _read_folder(version, source) if source.is_dir() else _read_archive(version, source)
    train, test = (
        _split(version, source, contents, files)
        for files in (version.train_files, version.test_files)
    )
    classes = tuple(contents[version.class_file].decode("ascii", "replace").split())
    if len(classes) != version.classes:
        raise DataError(
            f"{source / version.class_file} names {len(classes)} classes, not {version.classes}. "
            f"{_MEND}"
        )
    return train, test, classes


def is_official(version: Version, train: np.ndarray, test: np.ndarray) -> bool:
    """Tells whether the images hold the official pixels, by the sums over each channel."""

    def sums(image: np.ndarray) -> tuple[int, ...]:
        return tuple(int(total) for total in image.sum((0, 1, 2), dtype=np.int64))

    return sums(train) == version.train_sums and version.test_sums in (None, sums(test))


_MEND = "Fetch the official archive again, or remove this copy so that bnjax downloads one."


def _read_folder(version: Version, folder: Path) -> dict[str, bytes]:
    contents = {}
    for name in [*version.sizes(), version.class_file]:
        try:
            _check_size(
                version, folder, name, (folder / name).stat().st_size
            )  # first, as it may be huge, or no real file
            contents[name] = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"{folder / name} cannot be read: {error.strerror}. {_MEND}") from error
    return contents


def _read_archive(version: Version, path: Path) -> dict[str, bytes]:
    """Reads the files in the archive without unpacking anything to the disk.

    Links in it are not followed.
    """
    most = 2 * sum(version.sizes().values()) + (1 << 20)
    names = [*version.sizes(), version.class_file]
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(path) as stream:
            unpacked = stream.read(most + 1)
        if len(unpacked) > most:
            raise DataError(
                f"{path} unpacks to far more than {version.archive.name} should. {_MEND}"
            )
        with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in names and member.isfile():
                    _check_size(version, path, name, member.size)
                    # None only for what is no file.
                    contents[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as error:
        raise DataError(
            f"{path} is not a whole tar.gz archive: {getattr(error, 'strerror', None) or error}. "
            f"{_MEND}"
        ) from error
    if missing := [name for name in names if name not in contents]:
        raise DataError(f"{path} holds no file {', '.join(missing)}. {_MEND}")
    return contents


def _check_size(version: Version, source: Path, name: str, size: int) -> None:
    right = version.sizes().get(name)
    if right is None and size > CLASS_FILE_BYTES:
        raise DataError(
            f"{source / name} has {size:,} bytes, too many for the names of {version.classes} "
            f"classes. {_MEND}"
        )
    if right is not None and size != right:
        raise DataError(f"{source / name} has {size:,} bytes, not {right:,}. {_MEND}")


def _split(
    version: Version, source: Path, contents: dict[str, bytes], files: dict[str, int]
) -> Split:
    rows = [
        np.frombuffer(contents[name], np.uint8).reshape(-1, version.label_bytes + PIXELS)
        for name in files
    ]
    for name, row in zip(files, rows, strict=True):
        label = row[:, version.label_bytes - 1]
        if label.max() >= version.classes:
            wrong = f"example {label.argmax()} has the label {label.max()}"
            raise DataError(
                f"{source / name}: {wrong}, not one of 0 to {version.classes - 1}. {_MEND}"
            )
    image = np.empty((sum(files.values()), 32, 32, 3), np.uint8)
    planes = [
        row[:, version.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for row in rows
    ]
    return np.concatenate(planes, out=image), np.concatenate(
        [row[:, version.label_bytes - 1] for row in rows]
    ).astype(np.int32)
