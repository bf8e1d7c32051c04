"""Data sets by name: where they are found, CIFAR's files, its download, the digits."""

import dataclasses
import functools
import hashlib
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_cifar import make_tiny, tar_gz

from bnjax.data import cifar, datasets, tfds
from bnjax.errors import ConfigError, DataError, UnavailableError

ARCHIVE = "cifar-10-binary.tar.gz"


@pytest.fixture
def tiny(monkeypatch):
    made = make_tiny(0)
    monkeypatch.setitem(cifar.VERSIONS, "cifar10", made.version)
    return made


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves a folder on this machine; returns the folder and the versions that it serves."""
    monkeypatch.setattr(cifar, "STALL_SECONDS", 0.5)
    folder = tmp_path / "served"
    folder.mkdir()
    handler, here = functools.partial(SimpleHTTPRequestHandler, directory=folder), ("127.0.0.1", 0)
    with ThreadingHTTPServer(here, handler) as server, socket.create_server(here) as silent:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

        def version(content, of=cifar.VERSIONS["cifar10"], file=ARCHIVE, is_silent=False):
            port = (silent if is_silent else server.socket).getsockname()[1]
            url, sha256 = f"http://127.0.0.1:{port}/{file}", hashlib.sha256(content).hexdigest()
            return dataclasses.replace(of, url=url, sha256=sha256)

        yield folder, version
        server.shutdown()


def test_the_places_in_their_order(tmp_path, monkeypatch, server):
    """Each place holds other pixels; they are removed one after the other."""
    given, cache, made = tmp_path / "given", datasets.cache_dir(), [*map(make_tiny, range(5))]
    paths = [
        made[0].write_folder(given),
        made[1].write_archive(given / ARCHIVE),
        made[2].write_folder(cache),
        made[3].write_archive(cache / ARCHIVE),
        made[4].write_archive(server[0] / ARCHIVE),
    ]
    version = server[1](paths[4].read_bytes(), made[4].version)
    monkeypatch.setitem(cifar.VERSIONS, "cifar10", version)
    for tiny, path in zip(made, paths, strict=True):
        tiny.assert_in(datasets.load("cifar10", str(given), fallback="digits"))
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    tiny.assert_in(datasets.load("cifar10"))  # from the cache


def test_the_folder_of_the_archive_itself_may_be_given(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.write_folder(tmp_path))
    data = datasets.load("cifar10", ".")
    tiny.assert_in(data)
    assert (data.label, data.official) == ("cifar10", True)


def test_cifar100_has_the_fine_label_after_the_coarse_one(tmp_path):
    version = dataclasses.replace(
        cifar.VERSIONS["cifar100"], train_files={"train.bin": 2}, test_files={"test.bin": 1}
    )
    for name, fine in (("train.bin", (99, 0)), ("test.bin", (7,))):
        rows = [bytes([255, label]) + bytes(cifar.PIXELS) for label in fine]
        (tmp_path / name).write_bytes(b"".join(rows))
    (tmp_path / "fine_label_names.txt").write_text("\n".join(f"class{i}" for i in range(100)))
    train, test, classes = cifar.read(version, tmp_path)
    assert (train[1].tolist(), test[1].tolist(), classes[99]) == ([99, 0], [7], "class99")


DAMAGE = {  # the changed file or archive, its content, and what is said
    "truncated": ("data_batch_2.bin", lambda old: old[:-1], "has 18,437 bytes, not 18,438"),
    "label": ("data_batch_2.bin", lambda old: b"\xff" + old[1:], "example 0 has the label 255"),
    "classes": ("batches.meta.txt", lambda old: b"cat dog", "names 2 classes, not 10"),
    "missing": ("test_batch.bin", None, "cannot be read: No such file"),
    "half an archive": (ARCHIVE, lambda old: old[:-2000], "cannot be read"),
    "text": (ARCHIVE, lambda old: b"<html>Log in to the network</html>", "cannot be read"),
    "something else": (ARCHIVE, lambda old: tar_gz({"a/b.txt": b"c"}), "has no file data_batch_1"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files_are_named_and_no_fallback_hides_them(what, tiny, tmp_path):
    name, change, message = DAMAGE[what]
    is_archive = name == ARCHIVE
    path = tiny.write_archive(tmp_path / name) if is_archive else tiny.write_folder(tmp_path) / name
    path.write_bytes(change(path.read_bytes())) if change else path.unlink()
    with pytest.raises(DataError, match=rf"{name}.*{message}.*Download.*remove"):
        datasets.load("cifar10", str(tmp_path), fallback="digits")


@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_flipped_byte_is_an_error_or_harmless(position, value, tiny, tmp_path):
    """The archive has a checksum of its own."""
    path = tiny.write_archive(tmp_path / "a.tar.gz")
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    images, message = tiny.image, str(path)
    try:
        (train, _), (test, _), _ = cifar.read(tiny.version, path)
        images = np.concatenate([train, test])
    except DataError as error:
        message = str(error)
    np.testing.assert_array_equal(images, tiny.image)
    assert str(path) in message


def test_data_dir_has_to_be_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"config\.data\.dir = .*nowhere.*must be a folder"):
        datasets.load("cifar10", str(tmp_path / "nowhere"), fallback="digits")


@pytest.mark.parametrize("name", ["test_batch.bin", "data_batch_1.bin"])
def test_the_label_tells_that_pixels_are_not_official(name, tiny, tmp_path):
    path = tiny.write_folder(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    data = datasets.load("cifar10", str(tmp_path), label="CIFAR-10 (JPEG)")
    assert (data.official, data.label) == (False, "CIFAR-10 (JPEG) (not the official pixels)")


def test_the_official_sums_and_checksums_are_the_published_ones():
    published = {
        "cifar10": [0.49139967861519607, 0.48215840839460783, 0.44653091444546569],
        "cifar100": [0.5070751592371323, 0.48654887331495095, 0.4409178433670343],
    }
    known = tfds.import_tfds().download.checksums.get_all_url_infos()
    for name, version in cifar.VERSIONS.items():
        sums = np.divide(version.train_sums, 50_000 * 1024 * 255)
        np.testing.assert_allclose(sums, published[name], rtol=1e-12)
        assert known[version.url].checksum == version.sha256


def test_the_fallback_says_what_it_is_and_why(tiny, monkeypatch):
    nowhere = dataclasses.replace(tiny.version, url="http://127.0.0.1:1/a.tar.gz")
    monkeypatch.setitem(cifar.VERSIONS, "cifar10", nowhere)
    with pytest.raises(UnavailableError, match="could not be downloaded into") as error:
        datasets.load("cifar10")
    data = datasets.load("cifar10", fallback="digits", label="CIFAR-10 (mine)", train_images=100)
    assert (data.name, data.label, data.official) == ("digits", "digits", True)
    assert (data.fallback_reason, len(data.train)) == (str(error.value), 1438)


def test_an_archive_arrives_whole_and_alone_though_two_download_it(server, tmp_path):
    content = bytes(range(256)) * 8192  # 2 MiB
    (server[0] / ARCHIVE).write_bytes(content)
    download = functools.partial(cifar.download, server[1](content), tmp_path / "not" / "yet")
    with ThreadPoolExecutor(2) as pool:
        paths = [one.result() for one in (pool.submit(download), pool.submit(download))]
    assert {path.read_bytes() for path in paths} == {content}
    assert [*paths[0].parent.iterdir()] == [paths[0]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, "hash"), ({"file": "missing.tar.gz"}, "404"), ({"is_silent": True}, "timed out")],
)
def test_a_download_that_fails_says_why_and_leaves_no_file(server, options, reason, tmp_path):
    (server[0] / ARCHIVE).write_bytes(b"archive")
    with pytest.raises(UnavailableError, match=rf"{reason}.*--config\.data\.dir=FOLDER"):
        cifar.download(server[1](b"another", **options), tmp_path / "cache")
    assert [*(tmp_path / "cache").glob("*")] == []


def test_digits_are_the_published_ones():
    data, test = datasets.load("digits"), np.arange(1797) % 5 == 4
    image, label = np.empty((1797, 32, 32, 3), np.uint8), np.empty(1797, int)
    for split, rows in ((data.train, ~test), (data.test, test)):
        image[rows], label[rows] = split.image, split.label
    small = image[:, ::4, ::4, :1]
    np.testing.assert_array_equal(image, small.repeat(4, 1).repeat(4, 2).repeat(3, 3))
    # The published counts of each class (UCI's optdigits.names), and the first digits.
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (np.bincount(label).tolist(), data.classes[7]) == (counts, "seven")
    assert label[:10].tolist() == [*range(10)]
    levels = small[..., 0] * (16 / 255)
    first = [0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]
    np.testing.assert_array_equal(levels[0, :2].round(), first)
    np.testing.assert_allclose(levels, levels.round(), atol=16 / 255 / 2)


def test_the_first_training_images_are_kept_and_all_test_images():
    whole, few = datasets.load("digits"), datasets.load("digits", train_images=100)
    np.testing.assert_array_equal(few.train.image, whole.train.image[:100])
    np.testing.assert_array_equal(few.train.label, whole.train.label[:100])
    np.testing.assert_array_equal(few.test.label, whole.test.label)
    assert few.label == "digits, the first 100 training images"
    for impossible in (1439, -1):
        with pytest.raises(ConfigError, match=r"train_images = .* Allowed: 1 up to the 1438"):
            datasets.load("digits", train_images=impossible)


def test_a_split_is_uint8_images_and_as_many_labels():
    split = datasets.Split(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32))
    floats, flat, few = split.image.astype(float), split.image[..., 0], np.zeros(1, np.int32)
    for wrong in ({"image": floats}, {"image": flat}, {"label": few}):
        with pytest.raises(ValueError, match="not uint8"):
            dataclasses.replace(split, **wrong)


@pytest.mark.slow
def test_reading_needs_neither_tfds_nor_jax():
    names = "('tensorflow_datasets', 'jax', 'pooch')"
    program = f"import sys, bnjax.data.datasets; print([m for m in {names} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
