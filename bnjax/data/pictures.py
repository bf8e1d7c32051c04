"""Files of images, PNG, JPEG or .npy, as a network wants them."""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from bnjax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image ready for the network, float32 [h, w, c] from 0 to 1, and how it was made to fit."""

    name: str
    image: np.ndarray
    note: str = ""


def read_pictures(path: Path, shape: tuple[int, int, int]) -> list[Picture]:
    """Returns the images of a file, each resized to [h, w, c] = `shape`.

    Only a .npy file may hold several.

    Raises:
        DataError: naming the file, if it is missing, damaged, or not an image.
    """
    with _damage_named(str(path)):
        arrays = (
            _read_npy(path)
            if path.suffix.lower() == ".npy"
            else [_read_image(path, channels=shape[2])]
        )
        names = [str(path)] if len(arrays) == 1 else [f"{path}[{i}]" for i in range(len(arrays))]
        return [_fit(name, array, shape) for name, array in zip(names, arrays, strict=True)]


def read_picture(file: BinaryIO, name: str, shape: tuple[int, int, int]) -> Picture:
    """Returns the image of an open PNG or JPEG file, resized to [h, w, c] = `shape`.

    Raises:
        DataError: with that name, as `read_pictures` does.
    """
    with _damage_named(name):
        return _fit(name, _read_image(file, channels=shape[2]), shape)


def pixels(file: BinaryIO, name: str) -> int:
    """Returns how many pixels such a file says that it has, of which none is decoded.

    Raises:
        DataError: likewise.
    """
    with _damage_named(name), _opened(file) as image:
        return image.width * image.height


@contextlib.contextmanager
def _damage_named(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Pillow and NumPy raise a dozen types for damage
        reason = (
            getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        )
        raise DataError(f"{name} cannot be read as an image: {reason.rstrip('.')}.") from error


def eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """Returns an image upright, on white and in 8 bits, grey if `channels` is 1, else RGB."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255
        image = Image.fromarray(np.round(np.asarray(image, np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    mode = "L" if channels == 1 else "RGB"
    image.load()
    return image if image.mode == mode else image.convert(mode)


def _read_image(file: Path | BinaryIO, channels: int) -> np.ndarray:
    with _opened(file) as image:
        return np.asarray(eight_bits(image, channels))


@contextlib.contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of oddities that Pillow reads over
        warnings.simplefilter(
            "error", Image.DecompressionBombWarning
        )  # raised before anything is decoded
        try:
            image = Image.open(file, formats=("PNG", "JPEG"))
        except Image.UnidentifiedImageError as error:
            raise ValueError("it is neither a PNG nor a JPEG file") from error
        with image:
            yield image


def _read_npy(path: Path) -> list[np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of headers that older versions of NumPy wrote
        try:
            array = np.lib.format.open_memmap(
                path, mode="r"
            )  # mapped: a header cannot claim more than there is; never unpickled
        except ValueError as error:
            raise ValueError(f"it is not a whole .npy file of numbers ({error})") from error
    if array.size == 0:
        raise ValueError(f"its shape {array.shape} holds no pixel")
    if array.ndim not in (2, 3, 4):
        raise ValueError(f"its shape {array.shape} is not [h, w], [h, w, c] or [n, h, w, c]")
    if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"its values are {array.dtype}, neither uint8 nor floats from 0 to 1")
    if array.dtype != np.uint8 and not (np.min(array) >= 0 and np.max(array) <= 1):
        raise ValueError(
            f"its values lie between {np.min(array):g} and {np.max(array):g}; floats have to be "
            "from 0 to 1, or else be uint8"
        )
    return list(array) if array.ndim == 4 else [array]


def _fit(name: str, array: np.ndarray, shape: tuple[int, int, int]) -> Picture:
    height, width, channels = shape
    image = array.reshape(*array.shape[:2], -1)
    if image.shape[2] not in (1, channels):
        raise ValueError(f"it has {image.shape[2]} channels and the network takes {channels}")
    planes, note = [image[..., c] for c in range(image.shape[2])], ""
    scale = 255 if array.dtype == np.uint8 else 1
    if image.shape[:2] != (height, width):
        note = f"resized from {image.shape[1]}x{image.shape[0]} to {width}x{height}"
        planes = [_resize(plane, height, width) for plane in planes]
    fitted = np.stack(planes, axis=-1).astype(np.float32) / np.float32(scale)
    return Picture(name, np.broadcast_to(fitted.clip(0, 1), shape), note)


def _resize(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    image = Image.fromarray(
        np.ascontiguousarray(plane, np.float32)
    )  # in floats, so that nothing is rounded to 8 bits
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
