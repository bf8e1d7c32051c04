import dataclasses
import shutil

import numpy as np
import pooch
import pytest
import requests
from tiny_cifar import CLASSES, make_tiny, tar_gz

from bnjax.data import cifar, datasets, tfds
from bnjax.errors import ConfigError, DataError, UnavailableError


def test_the_places_in_their_order(tmp_path, monkeypatch):
    """Each place holds other pixels; they are removed one after the other."""
    given, cache = tmp_path / "given", datasets.cache_dir()
    made = {
        place: make_tiny(seed)
        for seed, place in enumerate(
            ("folder", "archive", "cache folder", "cache archive", "tfds", "server")
        )
    }
    monkeypatch.setitem(cifar.VERSIONS, "cifar10", made["server"].version)
    paths = {
        "folder": made["folder"].write_folder(given),
        "archive": made["archive"].write_archive(given / "cifar-10-binary.tar.gz"),
        "cache folder": made["cache folder"].write_folder(cache),
        "cache archive": made["cache archive"].write_archive(cache / "cifar-10-binary.tar.gz"),
    }
    copy = made["tfds"]
    prepared = [tmp_path]
    monkeypatch.setattr(tfds, "find", lambda name, data_dir: prepared[0])
    monkeypatch.setattr(
        tfds,
        "read",
        lambda name, data_dir: (
            (copy.image[:12], copy.label[:12]),
            (copy.image[12:], copy.label[12:]),
            CLASSES,
        ),
    )
    downloads = []

    def retrieve(url, known_hash, fname, path, downloader):
        downloads.append(url)
        path.mkdir(parents=True, exist_ok=True)
        return str(made["server"].write_archive(path / fname))

    monkeypatch.setattr(pooch, "retrieve", retrieve)

    def found():
        image = datasets.load("cifar10", str(given)).train.image
        return next(place for place, tiny in made.items() if np.array_equal(tiny.image[:12], image))

    for place, path in paths.items():
        assert found() == place
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert found() == "tfds"
    assert downloads == []
    prepared[0] = None
    assert [found(), found()] == ["server", "server"]
    assert downloads == [
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    ]  # once: then it is in the cache


@pytest.mark.parametrize("label", ["", "CIFAR-10 (JPEG)"])
def test_the_label_tells_whether_the_pixels_are_official(label, tiny, tmp_path):
    folder = tiny.write_folder(tmp_path)
    data = datasets.load("cifar10", str(tmp_path), label=label)
    assert (data.official, data.label) == (True, label or "cifar10")
    file = folder / "test_batch.bin"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    data = datasets.load("cifar10", str(tmp_path), label=label)
    assert (data.official, data.label) == (
        False,
        f"{label or 'cifar10'} (not the official pixels)",
    )
    assert data.name == "cifar10"


@pytest.fixture
def _no_network(monkeypatch):
    def retrieve(*_, **__):
        raise requests.ConnectionError

    monkeypatch.setattr(pooch, "retrieve", retrieve)


@pytest.mark.usefixtures("_no_network")
def test_without_network_and_fallback_the_error_says_how_to_get_the_data():
    with pytest.raises(
        UnavailableError,
        match=r"cifar10 is not on this machine, and https.*ConnectionError.*fetch.*--config\.",
    ):
        datasets.load("cifar10")


@pytest.mark.usefixtures("_no_network")
def test_a_folder_without_the_set_is_named(tmp_path):
    data = datasets.load("cifar10", str(tmp_path), fallback="digits")
    assert f"cifar10 is not in {tmp_path}, nor elsewhere on this machine" in data.fallback_reason


@pytest.mark.usefixtures("_no_network")
def test_the_fallback_says_what_it_is_and_why():
    data = datasets.load("cifar10", fallback="digits", label="CIFAR-10 (mine)")
    assert (data.name, data.label, data.official) == ("digits", "digits", True)
    assert "ConnectionError" in data.fallback_reason
    assert "--config.data.dir=FOLDER" in data.fallback_reason


@pytest.mark.usefixtures("_no_network")
def test_the_fallback_is_not_used_where_there_is_data(tiny, tmp_path):
    tiny.write_folder(tmp_path)
    data = datasets.load("cifar10", str(tmp_path), fallback="digits")
    assert (data.name, data.fallback_reason) == ("cifar10", "")


def test_a_server_that_sends_something_else_leaves_nothing_that_could_be_read_later(
    tiny, monkeypatch
):
    """The archive of another set, with its right checksum: the archive in the cache is named."""

    def retrieve(url, known_hash, fname, path, downloader):
        (path / fname).write_bytes(tar_gz({"readme.txt": b"hello"}))
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(DataError, match=r"cifar-10-binary\.tar\.gz holds no file"):
        datasets.load("cifar10", fallback="digits")


def test_the_cache_is_where_the_user_says(monkeypatch, tmp_path):
    assert datasets.cache_dir() != tmp_path
    monkeypatch.setenv("BNJAX_CACHE", str(tmp_path))
    assert datasets.cache_dir() == tmp_path
    monkeypatch.delenv("BNJAX_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert datasets.cache_dir() == tmp_path / "bnjax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.cache_dir() == tmp_path / ".cache" / "bnjax"


def test_digits_are_the_published_ones():
    data = datasets.load("digits")
    assert (data.train.image.shape, data.test.image.shape) == ((1438, 32, 32, 3), (359, 32, 32, 3))
    assert data.classes[7] == "seven"
    levels, label = (np.empty((1797, *shape)) for shape in ((8, 8), ()))
    test = np.arange(1797) % 5 == 4
    for split, rows in ((data.train, ~test), (data.test, test)):
        levels[rows], label[rows] = split.image[:, ::4, ::4, 0] * (16 / 255), split.label
        assert (split.image == split.image[:, :, :, :1]).all()
        assert (split.image[:, 0::4] == split.image[:, 3::4]).all()
        assert (split.image[:, :, 0::4] == split.image[:, :, 3::4]).all()
    # The published counts of each class (UCI's optdigits.names), and the first digit, a zero.
    counts = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(label.astype(int)).tolist() == counts
    first = [0, 0, 5, 13, 9, 1, 0, 0], [0, 0, 13, 15, 10, 15, 5, 0]
    np.testing.assert_array_equal(levels[0, :2].round(), first)
    np.testing.assert_allclose(levels, levels.round(), atol=16 / 255 / 2)


@pytest.mark.usefixtures("_no_network")
def test_the_first_training_images_are_kept_and_all_test_images():
    whole, few = datasets.load("digits"), datasets.load("digits", train_images=100)
    np.testing.assert_array_equal(few.train.image, whole.train.image[:100])
    np.testing.assert_array_equal(few.train.label, whole.train.label[:100])
    np.testing.assert_array_equal(few.test.label, whole.test.label)
    assert few.label == "digits, the first 100 training images"
    for impossible in (1439, -1):
        with pytest.raises(
            ConfigError, match=r"config\.data\.train_images = .* Allowed: 1 up to the 1438"
        ):
            datasets.load("digits", train_images=impossible)
    assert len(datasets.load("cifar10", fallback="digits", train_images=100).train.label) == 1438


def test_a_split_is_uint8_images_and_as_many_labels():
    split = datasets.Split(np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2, np.int32))
    for wrong in (
        {"image": split.image.astype(np.float32)},
        {"image": split.image[0]},
        {"label": split.label[:1]},
    ):
        with pytest.raises(ValueError, match="not uint8"):
            dataclasses.replace(split, **wrong)
