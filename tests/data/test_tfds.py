"""Sets that TensorFlow Datasets prepared, read without TensorFlow."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_cifar import CLASSES, make_tiny

from bnjax.data import datasets, tfds
from bnjax.data.stream import Reading
from bnjax.errors import DataError, UnavailableError


def png(array):
    """A file, because TFDS needs TensorFlow to encode an array."""
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, "png")
    file.seek(0)
    return file


def write(root, dataset, features, splits):
    """Prepares a set as array_record; `splits` maps names to lists of examples."""
    package = tfds.import_tfds()

    class _Builder(package.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = package.core.Version("3.0.2")
        pkg_dir_path = root

        def _info(self):
            return package.core.DatasetInfo(
                builder=self, features=package.features.FeaturesDict(features)
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            yield from enumerate(examples)

    package.disable_progress_bar()
    _Builder(data_dir=root, file_format=tfds.READABLE).download_and_prepare()


STREAM = Reading()
TINY = make_tiny(1)
GREY = np.random.default_rng(2).integers(0, 256, (9, 28, 28, 1), np.uint8)


def examples(*images, label=0):
    """Files are read but once, so that each split needs its own."""
    return [{"image": png(image), "label": label} for image in images]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    kinds = tfds.import_tfds().features
    image, label = kinds.Image(shape=(28, 28, 1)), kinds.ClassLabel(num_classes=3)
    of_cifar = {
        "id": kinds.Text(),
        "image": kinds.Image(shape=(32, 32, 3)),
        "label": kinds.ClassLabel(names=list(CLASSES)),
    }
    rows = [
        {"id": f"image_{i:05d}", "image": png(TINY.image[i]), "label": int(TINY.label[i])}
        for i in range(16)
    ]
    write(root, "cifar10", of_cifar, {"train": rows[:12], "test": rows[12:]})
    grey = {"image": image, "label": label}
    rows = [{"image": png(one), "label": i % 3} for i, one in enumerate(GREY)]
    write(root, "greys", grey, {"train": rows[:6], "validation": rows[6:]})
    one = GREY[:1]
    write(root, "one_split", grey, {"train": examples(*one)})
    splits = {split: [{"image": png(GREY[0])}] for split in ("train", "test")}
    write(root, "no_label", {"image": image}, splits)
    splits = {"train": examples(*one), "test": examples(*one, label=-1)}
    write(root, "unlabelled", grey, splits)
    sizes = [np.zeros((side, 8, 3), np.uint8) for side in (8, 9)]
    any_size = {"image": kinds.Image(shape=(None, None, 3)), "label": label}
    write(root, "sizes", any_size, {split: examples(*sizes) for split in ("train", "test")})
    assert "tensorflow" not in sys.modules
    return root


def test_cifar_comes_in_the_order_of_the_files(prepared):
    data = datasets.load("cifar10", str(prepared))
    np.testing.assert_array_equal(data.train.image, TINY.image[:12])
    np.testing.assert_array_equal(data.test.image, TINY.image[12:])
    np.testing.assert_array_equal([*data.train.label, *data.test.label], TINY.label)
    assert (data.name, data.official, data.classes) == ("cifar10", False, CLASSES)


def test_any_set_by_name_and_what_tfds_itself_reads(prepared):
    data = datasets.load("greys", str(prepared), label="my greys")
    assert (data.train.image.shape, data.test.image.shape) == ((6, 28, 28, 1), (3, 28, 28, 1))
    assert (data.train.image.dtype, data.train.label.dtype) == (np.uint8, np.int32)
    assert (data.name, data.label, data.official) == ("greys", "my greys", None)
    assert data.classes == ("0", "1", "2")
    sources = tfds.import_tfds().data_source("greys", data_dir=prepared, download=False)
    for split, name in ((data.train, "train"), (data.test, "validation")):
        found = sources[name]
        np.testing.assert_array_equal(split.image, [example["image"] for example in found])
        np.testing.assert_array_equal(split.label, [example["label"] for example in found])
    expected = {image.tobytes(): i % 3 for i, image in enumerate(GREY)}
    for split in (data.train, data.test):  # TFDS shuffled them
        for image, label in zip(split.image, split.label, strict=True):
            assert expected.pop(image.tobytes()) == label
    assert not expected


def test_a_set_that_stays_on_disk(prepared):
    name = "greys:3.0.2"
    memory, stream = (datasets.load(name, str(prepared), stream=one) for one in (None, STREAM))
    assert (stream.name, stream.classes, stream.official) == (name, ("0", "1", "2"), None)
    for split, records in ((memory.train, stream.train), (memory.test, stream.test)):
        found = records.select(slice(None))
        np.testing.assert_array_equal(found.image, split.image)
        np.testing.assert_array_equal(found.label, split.label)
    sizes = datasets.load("sizes", str(prepared), stream=Reading(6, 7))
    assert sizes.train.select(slice(None)).image.shape == (2, 6, 6, 3)


def test_of_several_versions_the_newest_and_of_several_configs_none(prepared, tmp_path):
    for copy in ("greys/9.0.0", "greys/10.0.0", "mnist/one/3.0.2", "mnist/two/3.0.2"):
        shutil.copytree(prepared / "greys" / "3.0.2", tmp_path / copy)
    assert tfds.folder("greys", str(tmp_path)) == tmp_path / "greys" / "10.0.0"
    assert tfds.folder("greys:9.0.0", str(tmp_path)) == tmp_path / "greys" / "9.0.0"
    with pytest.raises(DataError, match="Choose one: mnist/one, mnist/two"):
        tfds.folder("mnist", str(tmp_path))
    assert tfds.folder("mnist/two", str(tmp_path)) == tmp_path / "mnist" / "two" / "3.0.2"


def test_the_default_folder_of_tfds_comes_after_data_dir(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(datasets.load("greys", str(tmp_path)).train) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_split", "no array_record files of train and test"),
        ("no_label", "holds no labelled images"),
        ("unlabelled", "the label -1"),
        ("sizes", r"not all of one size \(.*--config.data.image_size=N"),
    ],
)
def test_an_unfit_set_says_why_and_no_fallback_hides_it(name, message, prepared):
    with pytest.raises(DataError, match=message):
        datasets.load(name, str(prepared), fallback="digits")


def test_a_damaged_copy_is_named_and_no_fallback_hides_it(prepared, tmp_path):
    folder = shutil.copytree(prepared / "greys", tmp_path / "greys")
    (record,) = folder.rglob("*train*")
    content = record.read_bytes()
    for damaged, message in (
        (content[:-70_000], f"{tmp_path}/greys.* is not a complete .*[Pp]repare them again"),
        (content.replace(b"label", b"lapel"), "record 0 of the train records .* cannot be read"),
    ):
        record.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            datasets.load("greys", str(tmp_path), fallback="digits")


def test_a_copy_that_only_tensorflow_reads(prepared, tmp_path):
    """TFDS's default is TFRECORD; its description is enough to be refused."""
    shutil.copytree(prepared / "greys", tmp_path / "mnist")
    (file,) = (tmp_path / "mnist").rglob("dataset_info.json")
    info = json.loads(file.read_text()) | {"name": "mnist", "fileFormat": "tfrecord"}
    file.write_text(json.dumps(info))
    with pytest.raises(UnavailableError, match="a format that only TensorFlow reads") as error:
        datasets.load("mnist", str(tmp_path))
    message = str(error.value)
    assert "pip install tensorflow " in message
    # In a folder of its own: beside a TFRECORD copy, TFDS refuses to prepare another.
    prepare = f"tfds.builder('mnist', data_dir='{tmp_path}/array_record', "
    assert f"{prepare}file_format='array_record').download_and_prepare()" in message
    assert f"--config.data.dir={tmp_path}/array_record" in message
    assert datasets.load("mnist", str(tmp_path), fallback="digits").fallback_reason == message
    file.write_text("{")
    with pytest.raises(UnavailableError, match="has not been prepared"):
        datasets.load("mnist", str(tmp_path))


def test_a_set_that_is_not_prepared(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match=f"has not been prepared in {tmp_path}") as error:
        datasets.load("imagenette/160px-v2")
    prepare = f"tfds.builder('imagenette/160px-v2', data_dir='{tmp_path}', file_format='array_"
    assert prepare in str(error.value)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cifar_10", "cifar10"), ("fashion-mnist", "fashion_mnist"), ("../etc", "Allowed")],
)
def test_an_unknown_name_is_refused_with_a_hint_and_no_fallback_hides_it(name, hint):
    with pytest.raises(DataError, match=hint) as error:
        datasets.load(name, fallback="digits")
    assert not isinstance(error.value, UnavailableError)
