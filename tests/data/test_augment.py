import jax
import numpy as np
import pytest

from bnjax.data import augment

N, H, W = 400, 8, 6
IMAGE = np.random.default_rng(0).integers(0, 256, (N, H, W, 3), np.uint8)
BATCH = {"image": IMAGE, "label": np.arange(N) % 10, "mask": np.arange(N) < 390}


def applied(augmentation, batch=BATCH, seed=0):
    found = jax.jit(augmentation)(jax.random.key(seed), batch)
    for name in batch.keys() & {"label", "mask"}:
        np.testing.assert_array_equal(found[name], batch[name])
    return found


def is_mirrored(found, image):
    """Which images are mirrored [n]; the others have to be as they were."""
    mirrored = (np.asarray(found) == image[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (found == image).all((1, 2, 3))).all()
    return mirrored


def test_a_flip_mirrors_with_probability_one_half():
    mirrored = is_mirrored(applied(augment.flip)["image"], IMAGE)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / N**0.5
    # With one key for both, nothing would be mirrored.
    both = augment.chain([augment.flip, augment.flip])
    assert 0 < is_mirrored(applied(both)["image"], IMAGE).mean() < 1


def test_alternating_flips_show_each_image_both_ways_in_any_two_epochs():
    order = np.random.default_rng(1).permutation(N)

    def epoch(number, rows, run=3):
        about = {"index": rows, "epoch": np.full(N, number), "run": jax.random.key(run)}
        batch = {"image": IMAGE[rows], **about}
        found = applied(augment.alternating_flip, batch, seed=number)["image"]
        return is_mirrored(found, IMAGE[rows])[np.argsort(rows)]

    first, second, third = epoch(0, np.arange(N)), epoch(1, order), epoch(4, order[::-1])
    np.testing.assert_array_equal(first, ~second)
    np.testing.assert_array_equal(first, third)
    assert abs(first.mean() - 0.5) < 4 * 0.5 / N**0.5
    assert 0.3 < (first == epoch(0, np.arange(N), run=4)).mean() < 0.7


@pytest.mark.parametrize(
    ("shift", "mode"), [(augment.translate, "reflect"), (augment.crop, "constant")]
)
def test_shifts_are_cuts_out_of_the_padded_image_and_all_occur(shift, mode):
    found = np.asarray(applied(shift(2))["image"])
    wide = np.pad(IMAGE, [(0, 0), (2, 2), (2, 2), (0, 0)], mode=mode)
    seen = set()
    for one, padded in zip(found, wide, strict=True):
        at = {
            (i, j)
            for i in range(5)
            for j in range(5)
            if (one == padded[i : i + H, j : j + W]).all()
        }
        assert len(at) == 1
        seen |= at
    assert len(seen) == 25


def test_a_cutout_is_one_rectangle_of_the_side_cut_off_at_the_edges():
    light = {"image": np.full((N, H, W, 3), 200, np.uint8)}
    found = np.asarray(applied(augment.cutout(3, fill=7.0), light)["image"])
    centres = set()
    for one in found:
        hole = (one == 7).all(-1)
        assert (one[~hole] == 200).all()
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        assert hole.sum() == len(rows) * len(columns)
        assert len(rows) <= 3
        assert len(columns) <= 3
        centres.add((rows.max() - min(1, rows.max()), columns.max() - min(1, columns.max())))
    assert found.dtype == np.uint8
    # A centre at row 0 leaves two rows, and there are as many centres as pixels.
    rows = (found == 7).all(-1).any(2).sum(1)
    assert abs((rows == 2).mean() - 2 / H) < 4 * (2 / H / N) ** 0.5
    assert len(centres) > H * W / 2


def test_brightness_adds_one_number_to_an_image():
    shift = np.asarray(applied(augment.brightness(0.2))["image"]) - IMAGE / np.float32(255)
    one = shift.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(shift, np.broadcast_to(one, shift.shape), atol=1e-6)
    assert abs(one).max() <= 0.2
    assert abs(one).max() > 0.19
    assert abs(one.mean()) < 4 * 0.2 / (3 * N) ** 0.5


def test_contrast_keeps_the_mean_and_multiplies_the_deviations():
    image = IMAGE.astype(np.float32) / 255
    found = np.asarray(applied(augment.contrast(0.3), {"image": image})["image"])
    axes = (1, 2, 3)
    np.testing.assert_allclose(found.mean(axes), image.mean(axes), atol=1e-5)
    factor = found.std(axes) / image.std(axes)
    assert factor.min() >= 0.7 - 1e-5
    assert factor.max() <= 1.3 + 1e-5
    assert factor.max() - factor.min() > 0.55


def test_a_config_is_applied_in_the_order_of_the_documentation():
    options = dict.fromkeys(("translate", "crop", "contrast", "cutout", "mixup"), 0)
    options |= {"flip": "none", "brightness": 0.1}
    assert augment.in_order(options | {"brightness": 0}, 10) is None
    bright = augment.in_order(options | {"cutout": 3 * H}, 10)
    assert (applied(bright)["image"] == 0).all()  # the hole comes last


def test_mixup_mixes_images_and_labels_by_one_share_and_leaves_padding_out():
    image = np.eye(N, dtype=np.float32).reshape(N, N, 1, 1)  # says which images went into it
    label, mask = np.arange(N) % 7, np.arange(N) < 390
    batch = {"image": image, "label": label, "mask": mask}
    mixup = jax.jit(augment.mixup(0.4, 7))
    found = jax.tree.map(np.asarray, mixup(jax.random.key(0), batch))
    shares = found["image"].reshape(N, N)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-6)
    assert ((shares > 0).sum(1) <= 2).all()
    np.testing.assert_allclose(found["label"], shares @ np.eye(7)[label], atol=1e-6)
    own = np.diag(shares)
    assert (own[~mask] == 1).all()
    assert (shares[:390, 390:] == 0).all()
    # Of Beta(0.4, 0.4) the mean is 1/2 and the variance 1 / (4 * 1.8); about 1 in 40 met padding.
    drawn = own[own < 1]
    assert abs(drawn.mean() - 0.5) < 4 * (1 / 7.2 / len(drawn)) ** 0.5
    assert abs(drawn.var() - 1 / 7.2) < 0.02
