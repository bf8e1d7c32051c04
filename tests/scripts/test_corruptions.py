"""Images made worse, against the formulas written out in float64."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from corruptions import KINDS, contrast, corrupt, gaussian_blur, gaussian_noise

pytestmark = pytest.mark.scripts

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
FLOATS = np.float32(IMAGES) / 255
STRENGTHS = (1, 2, 3, 4, 5)


def noisy(x, strength, seed=7):
    """The same pattern at each strength, cut off at 0 and 1."""
    z = np.random.default_rng(seed).standard_normal(x.shape, np.float32)
    return np.clip(x + (0.04, 0.06, 0.08, 0.09, 0.10)[strength - 1] * z, 0, 1)


def blurred(x, strength):
    """One dimension as a matrix: weights of the pixels, those beyond the edge given to the last."""
    sigma = (0.4, 0.6, 0.7, 0.8, 1.0)[strength - 1]
    reach, matrix = int(4 * sigma + 0.5), np.zeros((32, 32))
    for row in range(32):
        for step in range(-reach, reach + 1):
            matrix[row, np.clip(row + step, 0, 31)] += np.exp(-((step / sigma) ** 2) / 2)
    matrix /= matrix.sum(1, keepdims=True)
    return np.einsum("ai,bj,nijc->nabc", matrix, matrix, x)


def flat(x, strength):
    mean = x.mean((1, 2), keepdims=True)
    return mean + (0.75, 0.5, 0.4, 0.3, 0.15)[strength - 1] * (x - mean)


FORMULAS = {
    "noise": (lambda x, strength: gaussian_noise(x, strength, seed=7), noisy),
    "blur": (gaussian_blur, blurred),
    "contrast": (contrast, flat),
}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_floats_are_the_formula_and_files_its_nearest_levels(kind, strength):
    function, formula = FORMULAS[kind]
    wanted, found = formula(np.float64(FLOATS), strength), function(FLOATS, strength)
    assert found.dtype == np.float32
    # Values up to 1 in float32, and sums of 81 of them whose weights sum to 1.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)
    levels = corrupt(IMAGES, kind, strength, seed=7)
    assert levels.dtype == np.uint8
    assert np.abs(levels - 255 * wanted).max() <= 0.5 + 3e-4


def test_what_there_is_not():
    image = np.zeros((1, 8, 8, 1), np.uint8)
    with pytest.raises(ValueError, match="noise, blur, contrast"):
        corrupt(image, "fog", 1)
    for kind in KINDS:
        for strength in (0, 6):
            with pytest.raises(ValueError, match="1 to 5"):
                corrupt(image, kind, strength)
