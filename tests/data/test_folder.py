"""Folders of images, against Pillow by itself, and the published geometry of random boxes."""

import functools
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import small_digits
from PIL import Image, ImageFilter

from bnjax.data import datasets
from bnjax.data.feed import host_feed
from bnjax.data.stream import Reading, random_box, read_image
from bnjax.errors import ConfigError, DataError
from bnjax.train import build, parsing
from bnjax.train.loop import train_and_evaluate

CONFIG = Path(__file__).parents[2] / "configs" / "imagenet_resnet50.py"
CLASSES = ("cat", "dog", "eel")
BILINEAR = Image.Resampling.BILINEAR
RESIZED = Reading(16, 20, crop="random_resized")


def picture(rng, width, height):
    """A photograph, as far as spectra go: noise that is stronger the larger its structures."""
    small = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC).filter(ImageFilter.BoxBlur(2))


def write_images(folder, counts, sides, kind="png", classes=CLASSES):
    """Writes images of random sides, {split: images of each class}; returns them by path."""
    rng, made = np.random.default_rng(0), {}
    for (split, count), name in itertools.product(counts.items(), classes):
        (folder / split / name).mkdir(parents=True)
        for i in range(count):
            path = folder / split / name / f"{i}.{kind}"
            made[path] = picture(rng, *rng.integers(*sides, 2))
            made[path].save(path)
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return folder, write_images(folder, {"train": 4, "val": 2}, (20, 60))


def load(folder, reading=RESIZED, **options):
    return datasets.load("folder", str(folder), stream=reading, **options)


def centred(whole, shorter, side):
    """By hand: the shorter side becomes `shorter`, and the square in the middle is cut out."""
    width, height = (round(one * shorter / min(whole.size)) for one in whole.size)
    left, top = (width - side) // 2, (height - side) // 2
    return whole.resize((width, height), BILINEAR).crop((left, top, left + side, top + side))


def test_classes_are_sorted_and_the_first_rows_are_of_all_classes(photos):
    folder, made = photos
    (folder / "train" / "cat" / ".hidden.png").write_bytes(b"")
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    data = load(folder, Reading(16, 20))
    assert (data.name, data.classes) == ("folder", CLASSES)
    assert (len(data.train), len(data.test), data.train.image_shape) == (12, 6, (16, 16, 3))
    assert data.train.select(slice(None)).label.tolist() == [0, 1, 2] * 4
    assert load(folder, train_images=3).train.select(slice(None)).label.tolist() == [0, 1, 2]
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
    width, height = size
    rng = np.random.default_rng(0)
    area = rng.uniform(0.08, 1, 200_000)
    ratio = np.exp(rng.uniform(*np.log([3 / 4, 4 / 3]), 200_000))
    across, down = (np.round(np.sqrt(width * height * area * by)) for by in (ratio, 1 / ratio))
    fits = (across <= width) & (down <= height)
    wanted = np.stack([across, down])[:, fits]
    boxes = np.array([random_box(width, height, rng) for _ in range(5_000)])
    assert boxes.min() >= 0
    assert (boxes.max(0) <= [width, height, width, height]).all()
    sides = np.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]])
    is_drawn = (sides != [[min(width, round(height * 4 / 3))], [height]]).any(0)
    assert is_drawn.mean() >= 1 - (1 - fits.mean()) ** 10 - 0.02
    for statistic in (np.mean, np.std, functools.partial(np.quantile, q=0.9)):
        found, truth = statistic(sides[:, is_drawn], axis=1), statistic(wanted, axis=1)
        np.testing.assert_allclose(found, truth, rtol=0.04)
    # Each place is as likely as the others: the part of the room that is to the left of a box.
    room = width - sides[0]
    is_free = is_drawn & (room > 20)
    part = boxes[is_free, 0] / room[is_free]
    np.testing.assert_allclose(np.quantile(part, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.04)


def test_a_box_that_never_fits_is_the_largest_in_the_middle():
    class Large(np.random.Generator):
        """Draws the largest area each time."""

        def uniform(self, low, high):
            return high if low > 0 else 0.0

    rng = Large(np.random.PCG64(0))
    assert random_box(300, 100, rng) == (83, 0, 216, 100)  # 133 to 100
    assert random_box(100, 300, rng) == (0, 83, 100, 216)


@pytest.mark.parametrize("orientation", [1, 6])  # 6: turned by 90 degrees
@pytest.mark.parametrize("crop", ["centre", "random_resized"])
@pytest.mark.parametrize("size", [(1601, 1203), (400, 300)])
def test_large_jpeg_files_are_read_at_a_fraction_of_their_size(size, crop, orientation):
    whole = picture(np.random.default_rng(1), *size)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    whole.save(file, "jpeg", quality=95, exif=exif)
    whole = Image.open(file)
    upright = whole.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else whole
    rng, reading = None, Reading(160, 200, crop)
    if crop == "centre":
        wanted = centred(upright, 200, 160)
    else:
        rng = np.random.default_rng(0)
        box = random_box(*upright.size, np.random.default_rng(0))
        wanted = upright.resize((160, 160), BILINEAR, box)
    found = read_image(file.getvalue(), 3, reading, rng)
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
    (folder / "val" / "yak").mkdir()
    assert_refused(r"val has 4 class folders.* training images have 3.*\['yak'\]")
    (folder / "val" / "yak").rmdir()
    (folder / "train" / "cat" / "0.png").write_text("no image")
    assert_refused(r"train/cat/0.png cannot be read: .*cannot identify image")
    for split in ("train", "val"):
        (folder / split / "yak").mkdir()
    assert_refused(r"yak has no files named \*\.jpg")


MEMORY = "data.pipeline=memory data.image_size=0 data.shorter_side=0 data.crop=centre"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (MEMORY, "data.pipeline = 'memory'"),
        ("data.image_size=0 data.shorter_side=0", "data.crop = 'random_resized'"),
        ("data.image_size=32 data.shorter_side=31", "at least config.data.image_size, 32"),
        ("optimizer.schedule=linear", "optimizer.drops"),
        ("optimizer.drops=0.5,1.5", "optimizer.drops"),
    ],
)
def test_values_that_do_not_fit_are_refused(words, said):
    words = [f"--config.{word}" for word in ("data.workers=0", *words.split())]
    with pytest.raises(ConfigError, match=said):
        build.check(parsing.load(str(CONFIG), words))


def test_the_rate_falls_as_published():
    """Goyal et al., 2017: up to 0.1 in 5 epochs, a tenth after 30, 60 and 80 of 90."""
    from bnjax.train.optimizers import schedule

    rate = schedule(parsing.load(str(CONFIG), []).optimizer, 0.1, 90_000)
    epochs = [0, 2.5, 5, 29.99, 30, 59.99, 60, 79.99, 80, 89.99]
    wanted = [0, 0.05, 0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4]
    found = [float(rate(round(1000 * epoch))) for epoch in epochs]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


TINY = {
    "model__name": "convnet",  # compiles in seconds
    "model__mean": "()",
    "model__std": "()",
    "model__filters": "2",
    "model__kernels": "3",
    "model__strides": "2",
    "model__dense": "4",
    "model__dropout": "0.0",
    "model__norm_dense": "True",
    "data__image_size": 8,
    "data__shorter_side": 10,
    "train__batch_size": 4,
    "eval__batch_size": 6,
    "eval__precise_images": 12,
    "checkpoint__every_minutes": 0.0,
}


def test_a_run_of_the_config_resumes_to_the_bit_after_a_damaged_file(photos, tmp_path):
    folder, _ = photos
    words = small_digits.steps(4, data__dir=folder, data__workers=0, **TINY)
    config = parsing.load(str(CONFIG), words)
    config.devices = 1
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
