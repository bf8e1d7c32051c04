"""A CIFAR-10 of sixteen images, in the official layout."""

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np

from bnjax.data import cifar
from bnjax.data.datasets import Dataset

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclasses.dataclass(frozen=True)
class Tiny:
    version: cifar.Version
    image: np.ndarray  # [16, 32, 32, 3]; the last four are for testing
    label: np.ndarray

    def files(self) -> dict[str, bytes]:
        """The contents of each file, written out the slow way."""
        rows = [
            bytes([label]) + b"".join(image[:, :, channel].tobytes() for channel in range(3))
            for image, label in zip(self.image, self.label, strict=True)
        ]
        contents = {self.version.class_file: ("\n".join(CLASSES) + "\n\n").encode()}
        for name, count in (self.version.train_files | self.version.test_files).items():
            contents[name], rows = b"".join(rows[:count]), rows[count:]
        return contents

    def write_folder(self, parent: Path) -> Path:
        folder = parent / self.version.folder
        folder.mkdir(parents=True)
        for name, content in self.files().items():
            (folder / name).write_bytes(content)
        return folder

    def write_archive(self, path: Path) -> Path:
        files = {f"{self.version.folder}/{name}": of for name, of in self.files().items()}
        path.write_bytes(tar_gz(files))
        return path

    def assert_in(self, data: Dataset) -> None:
        for split, rows in ((data.train, slice(12)), (data.test, slice(12, None))):
            np.testing.assert_array_equal(split.image, self.image[rows])
            np.testing.assert_array_equal(split.label, self.label[rows])
            assert (split.image.dtype, split.label.dtype) == (np.uint8, np.int32)
        assert (data.name, data.classes, data.fallback_reason) == ("cifar10", CLASSES, "")


def tar_gz(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_tiny(seed: int) -> Tiny:
    image = np.random.default_rng(seed).integers(0, 256, (16, 32, 32, 3), np.uint8)
    version = dataclasses.replace(
        cifar.VERSIONS["cifar10"],
        train_files={"data_batch_1.bin": 6, "data_batch_2.bin": 6},
        test_files={"test_batch.bin": 4},
        train_sums=tuple(int(image[:12, :, :, c].sum()) for c in range(3)),
        test_sums=tuple(int(image[12:, :, :, c].sum()) for c in range(3)),
    )
    return Tiny(version, image, np.arange(16, dtype=np.int32) % 10)
