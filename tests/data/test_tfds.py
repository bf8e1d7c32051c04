"""Sets that TensorFlow Datasets prepared, read without TensorFlow."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from records_folder import picture
from tiny_cifar import CLASSES, make_tiny

from bnjax.data import cifar, datasets, tfds
from bnjax.data.pictures import Reading
from bnjax.errors import DataError, UnavailableError

TINY = make_tiny(1)
GREY = np.random.default_rng(2).integers(0, 256, (9, 28, 28, 1), np.uint8)


def write(root, name, features, splits):
    """Prepares a set as array_record; `splits` maps names to lists of examples."""
    package = tfds.import_tfds()

    class _Builder(package.dataset_builders.AdhocBuilder, skip_registration=True):
        pkg_dir_path = root

        def _split_generators(self, manager):  # without TensorFlow
            return {split: enumerate(examples) for split, examples in splits.items()}

    options = {"version": "3.0.2", "split_datasets": splits, "file_format": tfds.READABLE}
    features = package.features.FeaturesDict(features)
    package.disable_progress_bar()
    _Builder(name=name, features=features, data_dir=root, **options).download_and_prepare()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    root, kinds = tmp_path_factory.mktemp("prepared"), tfds.import_tfds().features
    sets = {
        "cifar10": (TINY.image, 12, "test", kinds.ClassLabel(names=list(CLASSES))),
        "greys": (GREY, 6, "validation", kinds.ClassLabel(num_classes=3)),
    }
    for name, (images, count, held_out, label) in sets.items():
        features = {"image": kinds.Image(shape=images.shape[1:]), "label": label}
        # Files, because TFDS needs TensorFlow to encode an array.
        rows = [
            {"image": io.BytesIO(picture(image)), "label": i % label.num_classes}
            for i, image in enumerate(images)
        ]
        if name == "cifar10":
            features |= {"id": kinds.Text()}
            rows = [row | {"id": f"image_{i:05d}"} for i, row in enumerate(rows)]
        write(root, name, features, {"train": rows[:count], held_out: rows[count:]})
    assert "tensorflow" not in sys.modules
    return root


def test_cifar_comes_in_the_order_of_its_files_which_come_first(prepared, monkeypatch):
    data = datasets.load("cifar10", str(prepared))
    TINY.assert_in(data)
    assert not data.official
    other = make_tiny(0)
    monkeypatch.setitem(cifar.VERSIONS, "cifar10", other.version)
    other.write_folder(datasets.cache_dir())
    other.assert_in(datasets.load("cifar10", str(prepared)))


@pytest.mark.parametrize("stream", [None, Reading()], ids=["memory", "stream"])
def test_any_set_by_name_is_what_tfds_itself_reads(stream, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))  # the default comes after data_dir
    data = datasets.load("greys", str(tmp_path), label="my greys", stream=stream)
    assert (data.name, data.label, data.official) == ("greys", "my greys", None)
    assert data.classes == ("0", "1", "2")
    sources = tfds.import_tfds().data_source("greys", data_dir=prepared, download=False)
    expected = {image.tobytes(): i % 3 for i, image in enumerate(GREY)}
    for split, name, size in ((data.train, "train", 6), (data.test, "validation", 3)):
        found, source = split.select(slice(None)), sources[name]
        assert (found.image.shape, found.image.dtype) == ((size, 28, 28, 1), np.uint8)
        assert found.label.dtype == np.int32
        np.testing.assert_array_equal(found.image, [example["image"] for example in source])
        np.testing.assert_array_equal(found.label, [example["label"] for example in source])
        for image, label in zip(found.image, found.label, strict=True):  # TFDS shuffled them
            assert expected.pop(image.tobytes()) == label
    assert not expected


def test_of_several_versions_the_newest_and_of_several_configs_none(prepared, tmp_path):
    for copy in ("greys/9.0.0", "greys/10.0.0", "mnist/one/3.0.2", "mnist/two/3.0.2"):
        shutil.copytree(prepared / "greys" / "3.0.2", tmp_path / copy)
    wanted = {
        "greys": "greys/10.0.0",
        "greys:9.0.0": "greys/9.0.0",
        "mnist/two": "mnist/two/3.0.2",
    }
    for name, path in wanted.items():
        assert tfds.folder(name, str(tmp_path)) == tmp_path / path
    with pytest.raises(DataError, match="Choose one: mnist/one, mnist/two"):
        tfds.folder("mnist", str(tmp_path))


def test_a_copy_that_only_tensorflow_reads(prepared, tmp_path):
    """TFDS's default is TFRECORD; its description is enough to be refused."""
    shutil.copytree(prepared / "greys", tmp_path / "mnist")
    (file,) = (tmp_path / "mnist").rglob("dataset_info.json")
    info = json.loads(file.read_text()) | {"name": "mnist", "fileFormat": "tfrecord"}
    file.write_text(json.dumps(info))
    with pytest.raises(UnavailableError, match="a format that only TensorFlow reads") as error:
        datasets.load("mnist", str(tmp_path))
    message, own = str(error.value), f"{tmp_path}/array_record"
    assert "pip install tensorflow " in message
    # In a folder of its own: beside a TFRECORD copy, TFDS refuses to prepare another.
    builder = f"tfds.builder('mnist', data_dir='{own}', file_format='array_record')"
    assert f"{builder}.download_and_prepare()" in message
    assert f"--config.data.dir={own}" in message
    assert datasets.load("mnist", str(tmp_path), fallback="digits").fallback_reason == message


def test_a_set_that_is_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match=f"has not been prepared in {tmp_path}") as error:
        datasets.load("imagenette/160px-v2")
    assert f"tfds.builder('imagenette/160px-v2', data_dir='{tmp_path}', file" in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar_10", "cifar10"), ("fashion-mnist", "fashion_mnist"), ("../etc", "Allowed")],
)
def test_an_unknown_name_is_refused_with_a_hint_and_no_fallback_hides_it(name, hint):
    with pytest.raises(DataError, match=hint) as error:
        datasets.load(name, fallback="digits")
    assert not isinstance(error.value, UnavailableError)
