import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnjax.data import augment

N, H, W = 400, 8, 6
IMAGE = np.random.default_rng(0).integers(0, 256, (N, H, W, 3), np.uint8)
BATCH = {"image": IMAGE, "label": np.arange(N) % 10, "mask": np.arange(N) < 390}
EVERY = {
    "flip": augment.flip,
    "translate": augment.translate(2),
    "crop": augment.crop(2),
    "cutout": augment.cutout(3),
    "brightness": augment.brightness(0.2),
    "contrast": augment.contrast(0.2),
}


def applied(augmentation, batch=BATCH, seed=0):
    return jax.jit(augmentation)(jax.random.key(seed), batch)


@pytest.mark.parametrize("augmentation", EVERY.values(), ids=EVERY)
def test_the_key_alone_decides_for_each_image_and_labels_go_through(augmentation):
    run = jax.jit(augmentation)
    found, again, other = (run(jax.random.key(seed), BATCH) for seed in (0, 0, 1))
    for name in ("label", "mask"):
        np.testing.assert_array_equal(found[name], BATCH[name])
    assert found["image"].shape == IMAGE.shape
    np.testing.assert_array_equal(found["image"], again["image"])
    assert (found["image"] != other["image"]).any()
    same = run(jax.random.key(0), {**BATCH, "image": np.broadcast_to(IMAGE[:1], IMAGE.shape)})
    assert len(np.unique(np.asarray(same["image"]).reshape(N, -1), axis=0)) > 1


def test_a_flip_is_the_image_or_its_mirror_with_probability_one_half():
    found = np.asarray(applied(augment.flip)["image"])
    mirrored = (found == IMAGE[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (found == IMAGE).all((1, 2, 3))).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / N**0.5


def test_alternating_flips_show_each_image_both_ways_in_any_two_epochs():
    order = np.random.default_rng(1).permutation(N)

    def epoch(number, rows, run=3):
        about = {"index": rows, "epoch": np.full(N, number), "run": jax.random.key(run)}
        batch = {"image": IMAGE[rows], **about}
        found = np.asarray(applied(augment.alternating_flip, batch, seed=number)["image"])
        mirrored = (found == IMAGE[rows][:, :, ::-1]).all((1, 2, 3))
        assert (mirrored | (found == IMAGE[rows]).all((1, 2, 3))).all()
        return mirrored[np.argsort(rows)]

    first, second, third = epoch(0, np.arange(N)), epoch(1, order), epoch(2, order[::-1])
    np.testing.assert_array_equal(first, ~second)
    np.testing.assert_array_equal(first, third)
    assert abs(first.mean() - 0.5) < 4 * 0.5 / N**0.5
    assert 0.3 < (first == epoch(0, np.arange(N), run=4)).mean() < 0.7


@pytest.mark.parametrize(("name", "mode"), [("translate", "reflect"), ("crop", "constant")])
def test_shifts_are_cuts_out_of_the_padded_image_and_all_occur(name, mode):
    found = np.asarray(applied(EVERY[name])["image"])
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


def test_a_chain_applies_in_order_with_other_keys():
    both = augment.chain([augment.flip, augment.flip])
    found = np.asarray(applied(both)["image"])
    mirrored = (found == IMAGE[:, :, ::-1]).all((1, 2, 3))
    assert 0 < mirrored.mean() < 1  # with one key for both nothing would be mirrored
    bright = augment.chain([augment.cutout(H * 3, fill=0.0), augment.brightness(0.1)])
    assert jnp.ptp(applied(bright)["image"], axis=(1, 2, 3)).max() < 1e-6


def test_mixup_mixes_images_and_labels_by_one_share_and_leaves_padding_out():
    image = np.eye(N, dtype=np.float32).reshape(N, N, 1, 1)  # says which images went into it
    label, mask = np.arange(N) % 7, np.arange(N) < 390
    batch = {"image": image, "label": label, "mask": mask}
    found = jax.tree.map(np.asarray, applied(augment.mixup(0.4, 7), batch))
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
