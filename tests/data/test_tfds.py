import io
import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from tiny_cifar import CLASSES, make_tiny

from bnjax.data import datasets, tfds
from bnjax.data.records import Crop, Reading
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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    kinds = tfds.import_tfds().features
    rows = [
        {"image": png(image), "label": int(label)}
        for image, label in zip(TINY.image, TINY.label, strict=True)
    ]
    classes = kinds.ClassLabel(names=list(CLASSES))
    write(
        root,
        "cifar10",
        {"id": kinds.Text(), "image": kinds.Image(shape=(32, 32, 3)), "label": classes},
        {
            "train": [row | {"id": f"train_{i:05d}"} for i, row in enumerate(rows[:12])],
            "test": [row | {"id": f"test_{i:05d}"} for i, row in enumerate(rows[12:])],
        },
    )
    grey = [{"image": png(image), "label": i % 3} for i, image in enumerate(GREY)]
    features = {"image": kinds.Image(shape=(28, 28, 1)), "label": kinds.ClassLabel(num_classes=3)}
    write(root, "greys", features, {"train": grey[:6], "validation": grey[6:]})
    write(root, "one_split", features, {"train": [{"image": png(GREY[0]), "label": 0}]})
    write(
        root,
        "no_label",
        {"image": features["image"]},
        {split: [{"image": png(GREY[0])}] for split in ("train", "test")},
    )
    write(
        root,
        "unlabelled",
        features,
        {
            "train": [{"image": png(GREY[0]), "label": 0}],
            "test": [{"image": png(GREY[0]), "label": -1}],
        },
    )
    sizes = {  # each has its own files: they are read but once
        split: [{"image": png(np.zeros((side, 8, 3), np.uint8)), "label": 0} for side in (8, 9)]
        for split in ("train", "test")
    }
    write(
        root,
        "sizes",
        {"image": kinds.Image(shape=(None, None, 3)), "label": classes},
        sizes,
    )
    assert "tensorflow" not in sys.modules
    return root


def test_cifar_comes_in_the_order_of_the_files(prepared, tiny):
    data = datasets.load("cifar10", str(prepared))
    np.testing.assert_array_equal(data.train.image, TINY.image[:12])
    np.testing.assert_array_equal(data.test.image, TINY.image[12:])
    np.testing.assert_array_equal(np.concatenate([data.train.label, data.test.label]), TINY.label)
    assert (data.name, data.official, data.classes) == (
        "cifar10",
        False,
        CLASSES,
    )  # `tiny` has other sums


def test_any_set_by_name(prepared):
    data = datasets.load("greys", str(prepared), label="my greys")
    assert (data.train.image.shape, data.test.image.shape) == ((6, 28, 28, 1), (3, 28, 28, 1))
    assert (data.train.image.dtype, data.train.label.dtype) == (np.uint8, np.int32)
    assert (data.name, data.label, data.official, data.classes) == (
        "greys",
        "my greys",
        None,
        ("0", "1", "2"),
    )
    expected = {image.tobytes(): i % 3 for i, image in enumerate(GREY)}
    for split in (data.train, data.test):  # TFDS shuffled them
        for image, label in zip(split.image, split.label, strict=True):
            assert expected.pop(image.tobytes()) == label
    assert not expected


def test_a_set_that_stays_on_disk(prepared):
    for name in ("greys", "greys:3.0.2"):
        memory, stream = (datasets.load(name, str(prepared), stream=one) for one in (None, STREAM))
        assert (stream.name, stream.classes, stream.official) == (name, ("0", "1", "2"), None)
        for split, records in ((memory.train, stream.train), (memory.test, stream.test)):
            found = records.select(slice(None))
            np.testing.assert_array_equal(found.image, split.image)
            np.testing.assert_array_equal(found.label, split.label)
    cifar = datasets.load("cifar10", str(prepared), stream=STREAM)
    assert (len(cifar.train), len(cifar.test), cifar.classes) == (12, len(TINY.label) - 12, CLASSES)
    found = cifar.train.select(slice(None))
    expected = zip(TINY.image[:12], TINY.label[:12], strict=True)
    assert sorted((image.tobytes(), label) for image, label in expected) == sorted(
        (image.tobytes(), label) for image, label in zip(found.image, found.label, strict=True)
    )


def test_images_of_different_sizes_that_stay_on_disk(prepared):
    sizes = datasets.load("sizes", str(prepared), stream=Reading(Crop(6, 7)))
    assert sizes.train.select(slice(None)).image.shape == (2, 6, 6, 3)
    with pytest.raises(DataError, match="holds no labelled images"):
        datasets.load("no_label", str(prepared), stream=STREAM)
    with pytest.raises(DataError, match="train and test"):
        datasets.load("one_split", str(prepared), stream=STREAM)


def test_of_several_versions_the_newest_and_of_several_configs_none(prepared, tmp_path):
    for version in ("9.0.0", "10.0.0"):
        shutil.copytree(prepared / "greys" / "3.0.2", tmp_path / "greys" / version)
    assert tfds.folder("greys", str(tmp_path)) == tmp_path / "greys" / "10.0.0"
    assert tfds.folder("greys:9.0.0", str(tmp_path)) == tmp_path / "greys" / "9.0.0"
    for config in ("one", "two"):
        shutil.copytree(prepared / "greys" / "3.0.2", tmp_path / "mnist" / config / "3.0.2")
    with pytest.raises(DataError, match="Name one of them: mnist/one, mnist/two"):
        tfds.folder("mnist", str(tmp_path))
    assert tfds.folder("mnist/two", str(tmp_path)) == tmp_path / "mnist" / "two" / "3.0.2"


def test_the_default_folder_of_tfds_comes_after_data_dir(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert len(datasets.load("greys", str(tmp_path)).train.label) == 6
    assert len(datasets.load("greys").train.label) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one_split", r"splits \['train'\]; bnjax needs"),
        ("no_label", r"holds \['image'\]; bnjax needs an 'image'"),
        ("unlabelled", "the label -1"),
        ("sizes", r"not all of one size \(.*\(8, 8, 3\)"),
    ],
)
def test_an_unfit_set_says_why_and_no_fallback_hides_it(name, message, prepared):
    with pytest.raises(DataError, match=message):
        datasets.load(name, str(prepared), fallback="digits")


def test_a_damaged_copy_is_named_and_no_fallback_hides_it(prepared, tmp_path):
    folder = shutil.copytree(prepared / "greys", tmp_path / "greys")
    (record,) = folder.rglob("*train*")
    record.write_bytes(record.read_bytes()[:-70_000])
    with pytest.raises(
        DataError, match=rf"'greys' in {tmp_path} cannot be read .*[Pp]repare it again"
    ):
        datasets.load("greys", str(tmp_path), fallback="digits")
    record.unlink()
    with pytest.raises(DataError, match=rf"'greys' in {tmp_path} cannot be read"):
        datasets.load("greys", str(tmp_path), fallback="digits")


def as_tfrecord(prepared, root, name):
    """What TFDS's default leaves: its description is enough to be refused."""
    shutil.copytree(prepared / "greys", root / name)
    (file,) = (root / name).rglob("dataset_info.json")
    info = json.loads(file.read_text()) | {"name": name, "fileFormat": "tfrecord"}
    file.write_text(json.dumps(info))


def test_a_copy_that_only_tensorflow_reads(prepared, tmp_path):
    as_tfrecord(prepared, tmp_path, "mnist")
    with pytest.raises(
        UnavailableError, match="is in the format tfrecord, which only TensorFlow reads"
    ) as error:
        datasets.load("mnist", str(tmp_path))
    message = str(error.value)
    assert "pip install tensorflow " in message
    # In a folder of its own: beside a TFRECORD copy, TFDS refuses to prepare another.
    assert (
        f"tfds.builder('mnist', data_dir='{tmp_path}/array_record', "
        "file_format='array_record').download_and_prepare()" in message
    )
    assert f"--config.data.dir={tmp_path}/array_record" in message
    assert datasets.load("mnist", str(tmp_path), fallback="digits").fallback_reason == message


@pytest.mark.parametrize("name", ["mnist", "imagenette/160px-v2", "mnist:3.0.1"])
def test_a_set_that_is_not_prepared(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(
        UnavailableError, match=rf"'{name}' has not been prepared in {tmp_path}"
    ) as error:
        datasets.load(name)
    assert f"tfds.builder('{name}', data_dir='{tmp_path}', file_format='array_record')" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar_10", "cifar10"),
        ("digit", "digits"),
        ("fashion-mnist", "fashion_mnist"),
        ("../etc", "Known"),
    ],
)
def test_an_unknown_name_is_refused_with_a_hint_and_no_fallback_hides_it(name, hint):
    with pytest.raises(DataError, match=hint) as error:
        datasets.load(name, fallback="digits")
    assert not isinstance(error.value, UnavailableError)


def test_finding_a_copy(prepared, tmp_path):
    assert tfds.find("cifar10", str(prepared)) == prepared
    assert tfds.find("cifar10:3.0.2", str(prepared)) == prepared
    assert tfds.find("cifar10:3.0.1", str(prepared)) is None
    assert tfds.find("cifar10", str(tmp_path)) is None
    as_tfrecord(prepared, tmp_path, "cifar10")
    assert tfds.find("cifar10", str(tmp_path)) is None
    (file,) = tmp_path.rglob("dataset_info.json")
    file.write_text("{")
    assert tfds.find("cifar10", str(tmp_path)) is None
