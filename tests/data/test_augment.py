import jax
import numpy as np
import pytest

from bnjax.data import augment

N, H, W = 400, 8, 6
IMAGE = np.random.default_rng(0).integers(0, 256, (N, H, W, 3), np.uint8)
MASK = np.arange(N) < 390
BATCH = {"image": IMAGE, "label": np.arange(N) % 10, "mask": MASK}


def applied(augmentation, batch=BATCH, seed=0):
    """Returns the augmented images; the label and the mask must be as they were."""
    found = jax.jit(augmentation)(jax.random.key(seed), batch)
    for name in batch.keys() & {"label", "mask"}:
        np.testing.assert_array_equal(found[name], batch[name])
    return np.asarray(found["image"])


def is_mirrored(found, image):
    """Which images are mirrored [n]; the others have to be as they were."""
    mirrored = (found == image[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (found == image).all((1, 2, 3))).all()
    return mirrored


def assert_mean(values, mean, variance):
    """Checks that independent values have this mean, within four standard errors."""
    assert abs(np.mean(values) - mean) < 4 * (variance / len(values)) ** 0.5


def assert_uniform(values, low, high):
    edge = 0.05 * (high - low)
    assert low - 1e-5 <= values.min() < low + edge
    assert high - edge < values.max() <= high + 1e-5
    assert_mean(values, (low + high) / 2, (high - low) ** 2 / 12)


def test_a_flip_mirrors_with_probability_one_half():
    assert_mean(is_mirrored(applied(augment.flip), IMAGE), 1 / 2, 1 / 4)
    # With one key for both, nothing would be mirrored.
    both = augment.chain([augment.flip, augment.flip])
    assert 0 < is_mirrored(applied(both), IMAGE).mean() < 1


def test_alternating_flips_show_each_image_both_ways_in_any_two_epochs():
    order = np.random.default_rng(1).permutation(N)

    def epoch(number, rows, run=3):
        about = {"index": rows, "epoch": np.full(N, number), "run": jax.random.key(run)}
        found = applied(augment.alternating_flip, {"image": IMAGE[rows], **about}, seed=number)
        return is_mirrored(found, IMAGE[rows])[np.argsort(rows)]

    first, second, third = epoch(0, np.arange(N)), epoch(1, order), epoch(4, order[::-1])
    np.testing.assert_array_equal(first, ~second)
    np.testing.assert_array_equal(first, third)
    assert_mean(first, 1 / 2, 1 / 4)
    assert_mean(first == epoch(0, np.arange(N), run=4), 1 / 2, 1 / 4)


@pytest.mark.parametrize(
    ("shift", "mode"), [(augment.translate, "reflect"), (augment.crop, "constant")]
)
def test_shifts_are_cuts_out_of_the_padded_image_and_all_occur(shift, mode):
    wide = np.pad(IMAGE, [(0, 0), (2, 2), (2, 2), (0, 0)], mode=mode)
    cuts = np.lib.stride_tricks.sliding_window_view(wide, (H, W), (1, 2))  # [n, 5, 5, 3, h, w]
    found = np.moveaxis(applied(shift(2)), -1, 1)[:, None, None]
    is_cut = (found == cuts).all((3, 4, 5))
    np.testing.assert_array_equal(is_cut.sum((1, 2)), 1)
    assert is_cut.any(0).all()


def test_a_cutout_is_a_square_around_any_pixel_cut_off_at_the_edges():
    found = applied(augment.cutout(3), {"image": np.full((N, H, W, 3), 200, np.uint8)})
    rows, columns = (np.abs(np.subtract.outer(range(n), range(n))) <= 1 for n in (H, W))
    squares = rows[:, None, :, None] & columns[None, :, None, :]  # [row, column, h, w]
    expected = np.where(squares[..., None], np.uint8(0), np.uint8(200))
    is_square = (found[:, None, None] == expected).all((3, 4, 5))
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(is_square.sum((1, 2)), 1)
    for axis, size in ((2, H), (1, W)):
        centres = is_square.any(axis).argmax(1)
        assert_mean(centres, (size - 1) / 2, (size**2 - 1) / 12)
    assert is_square.any(0).sum() > H * W / 2


def test_brightness_adds_one_number_to_an_image():
    shift = applied(augment.brightness(0.2)) - IMAGE / np.float32(255)
    np.testing.assert_allclose(np.ptp(shift, (1, 2, 3)), 0, atol=1e-6)
    assert_uniform(shift[:, 0, 0, 0], -0.2, 0.2)


def test_contrast_keeps_the_mean_and_multiplies_the_deviations():
    image = IMAGE.astype(np.float32) / 255
    found = applied(augment.contrast(0.3), {"image": image})
    mean, std = (of(image, (1, 2, 3), keepdims=True) for of in (np.mean, np.std))
    factor = found.std((1, 2, 3), keepdims=True) / std
    np.testing.assert_allclose(found, mean + factor * (image - mean), atol=1e-5)
    assert_uniform(factor.ravel(), 0.7, 1.3)


def test_a_config_is_applied_in_the_order_of_the_documentation():
    options = dict.fromkeys(("translate", "crop", "brightness", "contrast", "cutout", "mixup"), 0)
    assert augment.in_order(options | {"flip": "none"}, 10) is None
    bright = options | {"flip": "none", "brightness": 0.1, "cutout": 3 * H}
    assert (applied(augment.in_order(bright, 10)) == 0).all()  # the hole comes last


def test_mixup_mixes_images_and_labels_by_one_share_and_leaves_padding_out():
    image = np.eye(N, dtype=np.float32).reshape(N, N, 1, 1)  # says which images went into it
    label = np.arange(N) % 7
    mixup = jax.jit(augment.mixup(0.4, 7))
    found = mixup(jax.random.key(0), {"image": image, "label": label, "mask": MASK})
    shares = np.asarray(found["image"]).reshape(N, N)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    assert ((shares > 0).sum(1) <= 2).all()
    np.testing.assert_allclose(found["label"], shares @ np.eye(7)[label], atol=1e-6)
    own = np.diag(shares)
    assert (own[~MASK] == 1).all()
    assert (shares[MASK][:, ~MASK] == 0).all()
    # Of Beta(0.4, 0.4) the mean is 1/2 and the variance 1 / (4 * 1.8); about 1 in 40 met padding.
    drawn = own[own < 1]
    assert_mean(drawn, 1 / 2, 1 / 7.2)
    assert abs(drawn.var() - 1 / 7.2) < 0.02
