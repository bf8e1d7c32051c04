"""Reads PNG, JPEG and .npy files as inputs for a network."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bnjax.errors import DataError, brief

BICUBIC = Image.Resampling.BICUBIC


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image in the form that the network expects.

    Attributes:
        name: the name of the file, and the index of the image if the file contains several.
        image: float32 [h, w, c] from 0 to 1.
        note: a description of how the image was resized, or "".
    """

    name: str
    image: np.ndarray
    note: str = ""


def read_pictures(
    path: Path, shape: tuple[int, int, int], *, name: str = "", max_pixels: int | None = None
) -> list[Picture]:
    """Returns the images of a file, each resized to [h, w, c] = `shape`.

    Args:
        path: a PNG or JPEG file, or a .npy file with one or several images.
        shape: the shape [h, w, c] of the network's inputs.
        name: the name used in error messages; default: the path.
        max_pixels: the maximum number of pixels, checked before decoding; None for Pillow's limit.

    Raises:
        DataError: if the file is missing, damaged, or not an image.
    """
    name = name or str(path)
    try:
        if path.suffix.lower() == ".npy":
            arrays = _read_npy(path)
        else:
            arrays = [_read_image(path, shape[2], max_pixels)]
        names = [name] if len(arrays) == 1 else [f"{name}[{i}]" for i in range(len(arrays))]
        return [_fit(name, array, shape) for name, array in zip(names, arrays, strict=True)]
    except Exception as error:  # Pillow and NumPy raise many types of error
        raise DataError(f"{name} cannot be read as an image: {brief(error)}.") from error


def eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """Returns an upright image with 8 bits per channel: grey, RGB (on white) or RGBA."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip to 255
        image = Image.fromarray(np.round(np.asarray(image, np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data and channels != 4:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image.load()
    mode = {1: "L", 4: "RGBA"}.get(channels, "RGB")
    return image if image.mode == mode else image.convert(mode)


def _read_image(path: Path, channels: int, max_pixels: int | None) -> np.ndarray:
    try:
        image = Image.open(path, formats=("PNG", "JPEG"))
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is neither a PNG nor a JPEG file") from error
    with image:
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"it has more than {max_pixels:,} pixels")
        return np.asarray(eight_bits(image, channels))


def _read_npy(path: Path) -> list[np.ndarray]:
    # Memory mapping checks the header against the file size and never unpickles.
    array = np.lib.format.open_memmap(path, mode="r")
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(f"its shape {array.shape} is not [h, w], [h, w, c] or [n, h, w, c]")
    if array.dtype != np.uint8:
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"its values are {array.dtype}, neither uint8 nor floats from 0 to 1")
        low, high = np.min(array), np.max(array)
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"its values lie between {low:g} and {high:g}; floats must be from 0 to 1 (or "
                "use uint8)"
            )
    return list(array) if array.ndim == 4 else [array]


def _fit(name: str, array: np.ndarray, shape: tuple[int, int, int]) -> Picture:
    height, width, channels = shape
    image = array.reshape(*array.shape[:2], -1)
    if image.shape[2] not in (1, channels):
        raise ValueError(f"it has {image.shape[2]} channels, but the network needs {channels}")
    planes, note = np.moveaxis(image, -1, 0), ""
    if image.shape[:2] != (height, width):
        note = f"resized from {image.shape[1]}x{image.shape[0]} to {width}x{height}"
        # Resizes floats, because resizing 8-bit pixels would round them.
        floats = [Image.fromarray(np.ascontiguousarray(one, np.float32)) for one in planes]
        planes = np.stack([np.asarray(one.resize((width, height), BICUBIC)) for one in floats])
    scale = np.float32(255 if array.dtype == np.uint8 else 1)
    fitted = np.moveaxis(planes, 0, -1).astype(np.float32) / scale
    return Picture(name, np.broadcast_to(fitted.clip(0, 1), shape), note)
