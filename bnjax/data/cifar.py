"""Reads CIFAR-10 and CIFAR-100 from their official binary files, without pickle."""

import dataclasses
import gzip
import io
import logging
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np

from bnjax.errors import DataError, UnavailableError, brief

PIXELS = 32 * 32 * 3
STALL_SECONDS = 10.0  # a download fails after this time without data
MEND = "Download the official archive again, or remove this copy so that bnjax downloads it."

Arrays = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Version:
    """Describes one of the two data sets: its archive, files and pixel sums.

    `train_sums` and `test_sums` are the sums of all red, green and blue values in the official
    images. They were computed from the published per-channel means, which have 16 digits (for
    instance 0.49139967861519607 for red in CIFAR-10): these means times 255 times the number of
    pixels are whole numbers.
    """

    url: str
    sha256: str
    folder: str
    train_files: dict[str, int]  # the number of examples in each file
    test_files: dict[str, int]
    label_bytes: int  # CIFAR-100 stores a coarse label before the fine one
    classes: int
    class_file: str
    train_sums: tuple[int, int, int]
    test_sums: tuple[int, int, int] | None

    @property
    def archive(self) -> str:
        """The file name of the archive."""
        return self.url.rpartition("/")[2]


VERSIONS = {
    "cifar10": Version(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
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
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
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
    """Returns the unpacked folder (possibly `folder` itself) or the archive of a data set."""
    itself = folder.absolute()
    unpacked = itself if itself.name == version.folder else itself / version.folder
    candidates = (unpacked, itself / version.archive)
    return next((one for one in candidates if one.exists()), None)


def download(version: Version, cache: Path) -> Path:
    """Returns the path of the archive in the cache folder, after downloading it if necessary.

    Only a complete download with the right checksum is stored.

    Raises:
        UnavailableError: if the archive cannot be downloaded.
    """
    import pooch

    pooch.get_logger().setLevel(logging.WARNING)
    downloader = pooch.HTTPDownloader(timeout=STALL_SECONDS, progressbar=sys.stderr.isatty())
    known = f"sha256:{version.sha256}"
    try:
        return Path(pooch.retrieve(version.url, known, version.archive, cache, None, downloader))
    except (OSError, ValueError) as error:  # ValueError: wrong checksum
        raise UnavailableError(
            f"{version.archive} is not on this machine, and {version.url} could not be downloaded "
            f"into {cache} ({brief(error)}). Download it on a machine with a "
            "network connection, copy it into a folder, and add --config.data.dir=FOLDER."
        ) from error


def read(version: Version, source: Path) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Returns the training split, the test split and the class names.

    A split is a pair of images, uint8 [n, 32, 32, 3], and labels, int32 [n].

    Args:
        version: one of the two data sets.
        source: the unpacked folder of the data set, or its archive, which is unpacked in memory.

    Raises:
        DataError: if a file is missing, is damaged, has the wrong size, or has an invalid label.
    """
    names = [*version.train_files, *version.test_files, version.class_file]
    try:
        if source.is_dir():
            contents = {name: (source / name).read_bytes() for name in names}
        else:
            contents = _read_archive(source)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        name = getattr(error, "filename", None) or source
        raise DataError(f"{name} cannot be read: {brief(error)}. {MEND}") from error
    if missing := [name for name in names if name not in contents]:
        raise DataError(f"{source} has no file {', '.join(missing)}. {MEND}")
    classes = tuple(contents[version.class_file].decode("ascii", "replace").split())
    if len(classes) != version.classes:
        found = f"{len(classes)} classes, not {version.classes}"
        raise DataError(f"{source / version.class_file} names {found}. {MEND}")

    def arrays(files: dict[str, int]) -> Arrays:
        rows = [_rows(version, contents[name], source / name, n) for name, n in files.items()]
        row = np.concatenate(rows)
        planes = row[:, version.label_bytes :].reshape(-1, 3, 32, 32)
        image = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        return image, row[:, version.label_bytes - 1].astype(np.int32)

    return arrays(version.train_files), arrays(version.test_files), classes


def is_official(version: Version, train: np.ndarray, test: np.ndarray) -> bool:
    """Returns whether the pixels are the official ones, judged by the sum of each channel."""

    def sums(image: np.ndarray) -> tuple[int, ...]:
        return tuple(int(total) for total in image.sum((0, 1, 2), dtype=np.int64))

    return sums(train) == version.train_sums and version.test_sums in (None, sums(test))


def _read_archive(path: Path) -> dict[str, bytes]:
    """Returns the contents of the files in an archive, keyed by file name; ignores links."""
    content = io.BytesIO(
        gzip.decompress(path.read_bytes())
    )  # reads to the end, which verifies the checksum
    with tarfile.open(fileobj=content) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isfile()}
        return {name.rpartition("/")[2]: file.read() for name, file in files.items() if file}


def _rows(version: Version, content: bytes, file: Path, examples: int) -> np.ndarray:
    """Returns the label and pixel bytes of each example, uint8 [examples, bytes]."""
    size = version.label_bytes + PIXELS
    if len(content) != examples * size:
        raise DataError(f"{file} has {len(content):,} bytes, not {examples * size:,}. {MEND}")
    row = np.frombuffer(content, np.uint8).reshape(examples, size)
    label = row[:, version.label_bytes - 1]
    if label.max() >= version.classes:
        wrong = f"example {label.argmax()} has the label {label.max()}"
        raise DataError(f"{file}: {wrong}, not one of 0 to {version.classes - 1}. {MEND}")
    return row
