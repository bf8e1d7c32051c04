import gzip
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_cifar import CLASSES, tar_gz

from bnjax.data import cifar, datasets, tfds
from bnjax.errors import DataError


def read(tiny, source):
    return cifar.read(tiny.version, source)


def assert_is(tiny, contents):
    (train_image, train_label), (test_image, test_label), classes = contents
    np.testing.assert_array_equal(np.concatenate([train_image, test_image]), tiny.image)
    np.testing.assert_array_equal(np.concatenate([train_label, test_label]), tiny.label)
    assert (len(train_image), len(test_image)) == (12, 4)
    assert train_image.dtype == np.uint8
    assert train_image.flags.c_contiguous
    assert train_label.dtype == np.int32
    assert classes == CLASSES


def test_a_folder_and_an_archive_hold_the_same(tiny, tmp_path):
    assert_is(tiny, read(tiny, tiny.write_folder(tmp_path)))
    assert_is(tiny, read(tiny, tiny.write_archive(tmp_path / "a.tar.gz")))


def test_cifar100_has_the_fine_label_after_the_coarse_one(tmp_path):
    version = cifar.dataclasses.replace(
        cifar.VERSIONS["cifar100"], train_files={"train.bin": 2}, test_files={"test.bin": 1}
    )
    for name, fine in (("train.bin", (99, 0)), ("test.bin", (7,))):
        (tmp_path / name).write_bytes(
            b"".join(bytes([255, label]) + bytes(cifar.PIXELS) for label in fine)
        )
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"class{i}" for i in range(100)))
    train, test, classes = cifar.read(version, tmp_path)
    assert (train[1].tolist(), test[1].tolist(), classes[99]) == ([99, 0], [7], "class99")


def test_find_prefers_the_folder_and_takes_the_folder_itself(tiny, tmp_path, monkeypatch):
    assert cifar.find(tiny.version, tmp_path) is None
    archive = tiny.write_archive(tmp_path / "cifar-10-binary.tar.gz")
    assert cifar.find(tiny.version, tmp_path) == archive
    folder = tiny.write_folder(tmp_path)
    assert cifar.find(tiny.version, tmp_path) == folder
    assert cifar.find(tiny.version, folder) == folder
    monkeypatch.chdir(folder)
    found = cifar.find(tiny.version, Path())
    assert found is not None
    assert_is(tiny, read(tiny, found))


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "an example short": lambda path: path.write_bytes(path.read_bytes()[:-3073]),
    "too long": lambda path: path.write_bytes(path.read_bytes() + bytes(3073)),
    "empty": lambda path: path.write_bytes(b""),
    "label 255": lambda path: path.write_bytes(b"\xff" + path.read_bytes()[1:]),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a loop of links": lambda path: (path.unlink(), path.symlink_to(path.name)),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "endless": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "terabytes": lambda path: os.truncate(path, 1 << 40),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(damage, tiny, tmp_path):
    folder = tiny.write_folder(tmp_path)
    DAMAGE[damage](folder / "data_batch_2.bin")
    with pytest.raises(DataError, match=r"data_batch_2\.bin.*(Fetch|remove)") as error:
        datasets.load("cifar10", str(tmp_path), fallback="digits")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("names", ["", "cat dog", "x " * 11, "x " * 20000])
def test_a_wrong_list_of_classes_is_named(names, tiny, tmp_path):
    folder = tiny.write_folder(tmp_path)
    (folder / "batches.meta.txt").write_text(names)
    with pytest.raises(DataError, match=r"batches\.meta\.txt.*classes"):
        read(tiny, folder)


def test_a_file_without_permission_is_named(tiny, tmp_path, monkeypatch):
    folder = tiny.write_folder(tmp_path)
    (folder / "test_batch.bin").chmod(0)
    if os.geteuid() == 0:  # who may read everything
        for parent in (*tmp_path.parents[:3], tmp_path):
            parent.chmod(0o755)
        monkeypatch.setattr(cifar, "_check_size", _as_nobody(cifar._check_size))
    try:
        with pytest.raises(DataError, match=r"test_batch\.bin cannot be read: Permission denied"):
            read(tiny, folder)
    finally:
        if os.geteuid() != os.getuid():
            os.seteuid(os.getuid())


def _as_nobody(function):
    def first(*args):
        os.seteuid(65534)
        return function(*args)

    return first


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DataError, match=r"config\.data\.dir.*Permission denied"):
        datasets.load("cifar10", str(tmp_path))


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_data_dir_has_to_be_a_folder(place, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError,
        match=rf"config\.data\.dir = .*{place}.*(No such file|Not a directory).*cifar-10",
    ):
        datasets.load("cifar10", str(tmp_path / place), fallback="digits")


def _linked(files, name):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path, content in files.items():
            member = tarfile.TarInfo(path)
            if path.endswith(name):
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _claiming(files, name, size):
    """An archive whose header of one file claims a size that the archive does not hold."""
    buffer = io.BytesIO()
    for path, content in files.items():
        member = tarfile.TarInfo(path)
        member.size = size if path == name else len(content)
        buffer.write(member.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
    return gzip.compress(buffer.getvalue() + bytes(1024))


ARCHIVES = {
    "truncated": (lambda files: tar_gz(files)[:-2000], "not a whole tar.gz"),
    "cut in the header": (lambda files: tar_gz(files)[:5], "not a whole tar.gz"),
    "empty": (lambda files: b"", "not a whole tar.gz|holds no file"),
    "not compressed": (lambda files: gzip.decompress(tar_gz(files)), "not a whole tar.gz"),
    "text": (lambda files: b"<html>Log in to the network</html>", "not a whole tar.gz"),
    "a gzip of text": (lambda files: gzip.compress(b"hello" * 1000), "not a whole tar.gz"),
    "of something else": (
        lambda files: tar_gz({"a/readme.txt": b"hello"}),
        "holds no file data_batch_1.bin",
    ),
    "without one file": (
        lambda files: tar_gz({k: v for k, v in files.items() if k != "test_batch.bin"}),
        "no file test_batch.bin",
    ),
    "a link": (lambda files: _linked(files, "data_batch_1.bin"), "no file data_batch_1.bin"),
    "a file too long": (
        lambda files: tar_gz(files | {"test_batch.bin": bytes(4 * 3073 + 1)}),
        r"test_batch\.bin has 12,293 bytes, not 12,292",
    ),
    "a file of terabytes": (
        lambda files: _claiming(files, "test_batch.bin", 1 << 42),
        r"test_batch\.bin has 4,398,046,511,104 bytes",
    ),
    "a bomb": (lambda files: tar_gz({"zeros": bytes(1 << 22)} | files), "unpacks to far more"),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_a_bad_archive_is_named(kind, tiny, tmp_path):
    make, message = ARCHIVES[kind]
    path = tmp_path / "cifar-10-binary.tar.gz"
    path.write_bytes(make(tiny.files()))
    with pytest.raises(DataError, match=message) as error:
        datasets.load("cifar10", str(tmp_path), fallback="digits")
    assert str(path) in str(error.value)
    assert [file.name for file in tmp_path.rglob("*")] == [path.name]  # nothing was unpacked


@given(position=st.integers(0, 10_000), value=st.integers(0, 255), inside=st.booleans())
@example(position=156, value=0x78, inside=True)
def test_a_flipped_byte_is_an_error_or_harmless(position, value, inside, tiny, tmp_path):
    content = bytearray(gzip.decompress(tar_gz(tiny.files())) if inside else tar_gz(tiny.files()))
    content[position % len(content)] = value
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(content, 1) if inside else content)
    sizes, message = (12, 4), str(path)
    try:
        train, test, _ = read(tiny, path)
        sizes = (len(train[0]), len(test[0]))
    except DataError as error:
        message = str(error)
    assert sizes == (12, 4)
    assert str(path) in message


def test_official_pixels_are_known_by_their_sums(tiny):
    train, test = tiny.image[:12].copy(), tiny.image[12:].copy()
    assert cifar.is_official(tiny.version, train, test)
    assert not cifar.is_official(tiny.version, train, test ^ 1)
    train[3, 4, 5, 1] ^= 1
    assert not cifar.is_official(tiny.version, train, test)


def test_the_official_sums_are_the_published_means():
    published = {
        "cifar10": [0.49139967861519607, 0.48215840839460783, 0.44653091444546569],
        "cifar100": [0.5070751592371323, 0.48654887331495095, 0.4409178433670343],
    }
    for name, means in published.items():
        np.testing.assert_allclose(
            np.divide(cifar.VERSIONS[name].train_sums, 50_000 * 1024 * 255), means, rtol=1e-12
        )


def test_the_official_checksums_are_those_of_tfds():
    known = tfds.import_tfds().download.checksums.get_all_url_infos()
    for version in cifar.VERSIONS.values():
        info = known[version.archive.url]
        assert info.checksum == version.archive.sha256


@pytest.fixture(scope="session")
def real_folder(tmp_path_factory):
    """The 60,000 images as JPEG left them, which take 15 s to unpack."""
    if given := os.environ.get("BNJAX_CIFAR_DIR"):
        return Path(given)
    pytest.skip("BNJAX_CIFAR_DIR names no folder with CIFAR-10 recompressed as JPEG")


def test_the_real_images_are_not_official(real_folder):
    data = datasets.load("cifar10", str(real_folder))
    assert data.train.image.shape == (50_000, 32, 32, 3)
    assert data.test.image.shape == (10_000, 32, 32, 3)
    assert np.bincount(data.train.label).tolist() == [5000] * 10
    assert (data.official, data.label, data.classes) == (
        False,
        "cifar10 (not the official pixels)",
        CLASSES,
    )


def test_reading_needs_neither_tfds_nor_jax():
    names = "('tensorflow_datasets', 'jax', 'pooch')"
    program = f"import sys, bnjax.data.datasets; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
