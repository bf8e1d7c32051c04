"""Folders of images, against Pillow by itself, and the published geometry of random boxes."""

import functools
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from records_folder import picture, resized

from bnjax.data import datasets
from bnjax.data.feed import host_feed
from bnjax.data.pictures import Reading, random_box, read_image
from bnjax.errors import ConfigError, DataError
from bnjax.train import build, parsing
from bnjax.train.loop import train_and_evaluate
from bnjax.train.optimizers import schedule

CONFIG = Path(__file__).parents[2] / "configs" / "imagenet_resnet50.py"
CLASSES = ("cat", "dog", "eel")
BILINEAR = Image.Resampling.BILINEAR
RESIZED = Reading(16, 20, crop="random_resized")


def photograph(rng, width, height):
    """A photograph, as far as spectra go: noise that is stronger the larger its structures."""
    small = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.BoxBlur(2))


def write_images(folder, counts, sides):
    """Writes images of random sides, {split: images of each class}; returns them by path."""
    rng, made = np.random.default_rng(0), {}
    for (split, count), name in itertools.product(counts.items(), CLASSES):
        (folder / split / name).mkdir(parents=True)
        for path in (folder / split / name / f"{i}.png" for i in range(count)):
            made[path] = photograph(rng, *rng.integers(*sides, 2))
            made[path].save(path)
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return folder, write_images(folder, {"train": 4, "val": 2}, (20, 60))


def config_with(*words):
    """The config of the recipe with other values."""
    return parsing.load(str(CONFIG), [f"--config.{word}" for word in " ".join(words).split()])


def load(folder, reading=RESIZED):
    return datasets.load("folder", str(folder), stream=reading)


def centred(whole, shorter, side):
    whole = resized(whole, shorter)
    left, top = ((one - side) // 2 for one in whole.size)
    return whole.crop((left, top, left + side, top + side))


def test_classes_are_sorted_and_the_first_rows_are_of_all_classes(photos):
    folder, made = photos
    (folder / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    data = load(folder, Reading(16, 20))
    assert (data.name, data.classes) == ("folder", CLASSES)
    assert (len(data.train), len(data.test), data.train.image_shape) == (12, 6, (16, 16, 3))
    assert data.train.select(slice(None)).label.tolist() == [0, 1, 2] * 4
    image = data.test.select(slice(None)).image
    for row, (i, name) in enumerate(itertools.product(range(2), CLASSES)):
        whole = made[folder / "val" / name / f"{i}.png"]
        np.testing.assert_array_equal(image[row], np.asarray(centred(whole, 20, 16)))


def test_training_images_are_random_boxes_of_the_files_resized(photos):
    """The box of an image follows from the seed and its place in the endless stream alone."""
    folder, made = photos
    items = host_feed(load(folder).train, 5, shuffle=True).items(3, 1)
    found = [*itertools.islice(items, 5)]
    order = np.concatenate([np.random.default_rng([3, i]).permutation(12) for i in range(3)])
    index, image = (np.concatenate([batch[key] for batch in found]) for key in ("index", "image"))
    np.testing.assert_array_equal(index, order[5:30])
    for place, (row, one) in enumerate(zip(index, image, strict=True), 5):
        whole = made[folder / "train" / CLASSES[row % 3] / f"{row // 3}.png"]
        box = random_box(*whole.size, np.random.default_rng([3, place, 1]))
        np.testing.assert_array_equal(one, np.asarray(whole.resize((16, 16), BILINEAR, box)))


@pytest.mark.parametrize("size", [(500, 375), (300, 300), (400, 90)])
def test_random_boxes_have_the_published_distribution(size):
    """Szegedy et al., 2015, as in torchvision: drawn until they fit, here all at once."""
    rng, (width, height), limit = np.random.default_rng(0), size, np.array(size)[:, None]
    area = width * height * rng.uniform(0.08, 1, 200_000)
    ratio = np.exp(rng.uniform(*np.log([3 / 4, 4 / 3]), 200_000))
    wanted = np.round(np.sqrt([area * ratio, area / ratio]))
    fits = (wanted <= limit).all(0)
    boxes = np.array([random_box(width, height, rng) for _ in range(5_000)]).T
    start, sides = boxes[:2], boxes[2:] - boxes[:2]
    assert ((start >= 0) & (boxes[2:] <= limit)).all()
    is_drawn = (sides != [[min(width, round(height * 4 / 3))], [height]]).any(0)
    assert is_drawn.mean() >= 1 - (1 - fits.mean()) ** 10 - 0.02
    for statistic in (np.mean, np.std, functools.partial(np.quantile, q=0.9)):
        found, truth = statistic(sides[:, is_drawn], axis=1), statistic(wanted[:, fits], axis=1)
        np.testing.assert_allclose(found, truth, rtol=0.04)
    # Each place is as likely as the others: the part of the room that is to the left of a box.
    room = width - sides[0]
    part = (start[0] / np.maximum(room, 1))[is_drawn & (room > 20)]
    np.testing.assert_allclose(np.quantile(part, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)


def test_a_box_that_never_fits_is_the_largest_in_the_middle():
    rng = np.random.default_rng(0)
    assert random_box(10_000, 10, rng) == (4993, 0, 5006, 10)  # 13 to 10
    assert random_box(10, 10_000, rng) == (0, 4993, 10, 5006)


@pytest.mark.parametrize("orientation", [1, 6])  # 6: turned by 90 degrees
@pytest.mark.parametrize("crop", ["centre", "random_resized"])
@pytest.mark.parametrize("size", [(1601, 1203), (400, 300)])
def test_large_jpeg_files_are_read_at_a_fraction_of_their_size(size, crop, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    whole = photograph(np.random.default_rng(1), *size)
    file = picture(whole, "jpeg", quality=95, exif=exif)
    whole = Image.open(io.BytesIO(file))
    upright = whole.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else whole
    if crop == "centre":
        rng, wanted = None, centred(upright, 200, 160)
    else:
        box = random_box(*upright.size, np.random.default_rng(0))
        rng, wanted = np.random.default_rng(0), upright.resize((160, 160), BILINEAR, box)
    found = read_image(file, 3, Reading(160, 200, crop), rng)
    off = np.abs(np.asarray(found, float) - np.asarray(wanted, float))
    if max(size) < 500 or orientation > 1:  # too small to be read at half its size, or turned
        assert off.max() == 0
    else:  # A shift by half a pixel would give 4 and more in the mean.
        assert 0 < off.mean() < 2


def test_a_folder_that_is_no_set_says_why(tmp_path):
    folder = tmp_path / "images"
    with pytest.raises(ConfigError, match=r"config.data.dir = '' .*train/CLASS and test/CLASS"):
        datasets.load("folder", stream=RESIZED)

    def assert_refused(said):
        with pytest.raises(DataError, match=said):
            load(folder)

    folder.mkdir()
    assert_refused(r"no folders train and test \(or val\)")
    write_images(folder, {"train": 1, "val": 1}, (20, 30))
    (folder / "train" / "cat" / "0.png").write_text("no image")
    assert_refused(r"train/cat/0.png cannot be read: .*cannot identify image")
    (folder / "val" / "yak").mkdir()
    assert_refused(r"val has 4 class folders.* training images have 3.*\['yak'\]")
    (folder / "train" / "yak").mkdir()
    assert_refused(r"yak has no files named \*\.jpg")


def test_the_rate_falls_as_published():
    """Goyal et al., 2017: up to 0.1 in 5 epochs, a tenth after 30, 60 and 80 of 90."""
    rate = schedule(config_with().optimizer, 0.1, 90_000)
    epochs = [0, 2.5, 5, 29.99, 30, 59.99, 60, 79.99, 80, 89.99]
    wanted = [0, 0.05, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4]
    np.testing.assert_allclose([rate(round(1000 * one)) for one in epochs], wanted, rtol=1e-5)


TINY = """
model.name=convnet model.mean=() model.std=() model.filters=2 model.kernels=3 model.strides=2
model.dense=4 model.dropout=0.0 model.norm_dense=True data.image_size=8 data.shorter_side=10
train.epochs=0 train.steps=4 train.batch_size=4 eval.batch_size=6 eval.precise_images=12
eval.every_epochs=0 eval.every_steps=4 eval.histograms=0 eval.pictures=0 eval.gap_images=0
checkpoint.every_minutes=0 data.workers=0 devices=1
"""


def test_a_run_of_the_config_resumes_to_the_bit_after_a_damaged_file(photos, tmp_path):
    folder, _ = photos
    config = config_with(TINY, f"data.dir={folder}")
    data = build.dataset(config)
    whole = train_and_evaluate(config, tmp_path / "whole", data)
    # The last file of the first epoch, in the third step: two steps are complete.
    row = np.random.default_rng([0, 0]).permutation(12)[11]
    path = Path(data.train.source.where(row))
    kept = path.read_bytes()
    path.write_bytes(kept[:100])
    with pytest.raises(DataError, match=str(path)):
        train_and_evaluate(config, tmp_path / "stopped", data)
    path.write_bytes(kept)
    assert train_and_evaluate(config, tmp_path / "stopped", data)["steps"] == 4
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "stopped")]
    assert lines[0] == lines[1]
    assert whole["final_test"]["count"] == 6
