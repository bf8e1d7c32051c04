"""Corrupts images in three ways at five strengths, to evaluate networks on shifted data.

The strengths are those of CIFAR-10-C (Hendrycks & Dietterich, 2019, and the script
`make_cifar_c.py` of their repository github.com/hendrycks/robustness).
"""

import numpy as np
from scipy import ndimage

KINDS = ("noise", "blur", "contrast")
# For strengths 1 to 5 and images of 32x32 pixels with values from 0 to 1.
NOISE_STD = (0.04, 0.06, 0.08, 0.09, 0.10)
BLUR_SIGMA = (0.4, 0.6, 0.7, 0.8, 1.0)  # pixels
CONTRAST = (0.75, 0.5, 0.4, 0.3, 0.15)


def gaussian_noise(image: np.ndarray, strength: int, *, seed: int) -> np.ndarray:
    """Returns clip(x + s z, 0, 1), with s from `NOISE_STD` and z normal for each value.

    z is drawn by `numpy.random.default_rng(seed)`, in the order of the values: the same seed gives
    the same z at each strength.

    Args:
        image: float [n, h, w, c], from 0 to 1.
        strength: 1 to 5.
        seed: of z.
    """
    z = np.random.default_rng(seed).standard_normal(image.shape, np.float32)
    return (image + _at(NOISE_STD, strength) * z).clip(0, 1).astype(image.dtype)


def gaussian_blur(image: np.ndarray, strength: int) -> np.ndarray:
    """Returns each channel convolved with a Gaussian of the width from `BLUR_SIGMA`.

    The Gaussian ends at 4 sigma, rounded to pixels, sums to 1, and beyond the edge of the image its
    last row or column goes on.

    Args:
        image: float [n, h, w, c], from 0 to 1.
        strength: 1 to 5.
    """
    sigma = _at(BLUR_SIGMA, strength)
    blurred = ndimage.gaussian_filter(image, (0, sigma, sigma, 0), mode="nearest", truncate=4.0)
    return blurred.clip(0, 1)


def contrast(image: np.ndarray, strength: int) -> np.ndarray:
    """Returns clip(m + c (x - m), 0, 1), with c from `CONTRAST` and m the mean of x.

    m is the mean of all pixels of an image, for each channel.

    Args:
        image: float [n, h, w, c], from 0 to 1.
        strength: 1 to 5.
    """
    mean = image.mean((1, 2), keepdims=True)
    return (mean + _at(CONTRAST, strength) * (image - mean)).clip(0, 1).astype(image.dtype)


def corrupt(image: np.ndarray, kind: str, strength: int, *, seed: int = 0) -> np.ndarray:
    """Returns images as a file would hold them: uint8, rounded to the nearest.

    CIFAR-10-C rounds down, which darkens images by half a level on average.

    Args:
        image: uint8 [n, h, w, c].
        kind: one of `KINDS`.
        strength: 1 to 5.
        seed: of the noise.

    >>> corrupt(np.array([[[[0], [200]]]], np.uint8), "contrast", 2).ravel()
    array([ 50, 150], dtype=uint8)
    """
    given = image.astype(np.float32) / 255
    if kind == "noise":
        worse = gaussian_noise(given, strength, seed=seed)
    elif kind == "blur":
        worse = gaussian_blur(given, strength)
    elif kind == "contrast":
        worse = contrast(given, strength)
    else:
        raise ValueError(f"kind = {kind!r} is invalid; allowed are {', '.join(KINDS)}")
    return np.rint(worse * 255).astype(np.uint8)


def _at(constants: tuple[float, ...], strength: int) -> np.float32:
    if strength not in range(1, 1 + len(constants)):
        raise ValueError(f"strength = {strength} is invalid; allowed are 1 to 5")
    return np.float32(constants[strength - 1])
