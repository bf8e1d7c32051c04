"""Images made worse, against the formulas written out in float64."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from corruptions import KINDS, contrast, corrupt, gaussian_blur, gaussian_noise

pytestmark = pytest.mark.scripts

IMAGES = np.random.default_rng(0).random((4, 32, 32, 3), np.float32)
STRENGTHS = (1, 2, 3, 4, 5)
# Values up to 1 in float32, and sums of 81 of them whose weights sum to 1.
close = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("strength", STRENGTHS)
def test_noise(strength):
    std = (0.04, 0.06, 0.08, 0.09, 0.10)[strength - 1]
    grey = np.full((8, 32, 32, 3), 0.5, np.float32)
    noisy = gaussian_noise(grey, strength, seed=3)
    z = (np.float64(noisy) - 0.5) / std
    n = z.size
    # Five standard errors of the mean, of the standard deviation, and of the neighbours' product.
    assert abs(z.mean()) < 5 / np.sqrt(n)
    assert abs(z.std() - 1) < 5 / np.sqrt(2 * n)
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / np.sqrt(n)
    np.testing.assert_array_equal(noisy, gaussian_noise(grey, strength, seed=3))
    assert not np.array_equal(noisy, gaussian_noise(grey, strength, seed=4))
    # The same pattern at each strength: what was not cut off is in proportion.
    first = (np.float64(gaussian_noise(grey, 1, seed=3)) - 0.5) / 0.04
    np.testing.assert_allclose(z, first, rtol=0, atol=1e-5)
    white = gaussian_noise(np.ones_like(grey), strength, seed=3)
    np.testing.assert_allclose(white, np.minimum(1 + std * z, 1), **close)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_blur(strength):
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[strength - 1]
    reach = int(4 * sigma + 0.5)
    # One dimension as a matrix: weights of the pixels, those beyond the edge given to the last.
    matrix = np.zeros((32, 32))
    for row in range(32):
        for step in range(-reach, reach + 1):
            matrix[row, np.clip(row + step, 0, 31)] += np.exp(-((step / sigma) ** 2) / 2)
    matrix /= matrix.sum(1, keepdims=True)
    expected = np.einsum("ai,bj,nijc->nabc", matrix, matrix, np.float64(IMAGES))
    found = gaussian_blur(IMAGES, strength)
    np.testing.assert_allclose(found, expected, **close)
    assert found.dtype == np.float32
    assert found.std() < gaussian_blur(IMAGES, strength - 1).std() if strength > 1 else True


@pytest.mark.parametrize("strength", STRENGTHS)
def test_contrast(strength):
    factor = (0.75, 0.5, 0.4, 0.3, 0.15)[strength - 1]
    given = np.float64(IMAGES)
    mean = given.mean((1, 2), keepdims=True)
    found = contrast(IMAGES, strength)
    np.testing.assert_allclose(found, mean + factor * (given - mean), **close)
    np.testing.assert_allclose(found[2:3], contrast(IMAGES[2:3], strength), **close)


@pytest.mark.parametrize("kind", KINDS)
def test_images_as_a_file_holds_them(kind):
    image = np.random.default_rng(1).integers(0, 256, (3, 32, 32, 3), np.uint8)
    before = image.copy()
    found = corrupt(image, kind, 4, seed=7)
    np.testing.assert_array_equal(image, before)
    functions = {
        "noise": lambda x: gaussian_noise(x, 4, seed=7),
        "blur": lambda x: gaussian_blur(x, 4),
        "contrast": lambda x: contrast(x, 4),
    }
    levels = 255 * np.float64(functions[kind](np.float32(image) / 255))
    assert found.dtype == np.uint8
    assert np.abs(found - levels).max() <= 0.5 + 1e-4
    assert abs((found - levels).mean()) < 5 * np.sqrt(1 / 12 / image.size)
    worse = [np.abs(np.float64(corrupt(image, kind, s)) - image).mean() for s in STRENGTHS]
    assert worse == sorted(worse)


def test_what_there_is_not():
    image = np.zeros((1, 8, 8, 1), np.uint8)
    with pytest.raises(ValueError, match="noise, blur, contrast"):
        corrupt(image, "fog", 1)
    for kind in KINDS:
        for strength in (0, 6):
            with pytest.raises(ValueError, match="1 to 5"):
                corrupt(image, kind, strength)
