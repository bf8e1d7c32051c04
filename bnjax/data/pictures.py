"""Decodes, resizes and crops images: PNG, JPEG and .npy files, and the images of records."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from bnjax.errors import DataError, brief

BICUBIC = Image.Resampling.BICUBIC
Box = tuple[int, int, int, int]  # left, upper, right and lower edge in pixels


@dataclasses.dataclass(frozen=True)
class Reading:
    """Settings for reading records.

    Attributes:
        image_size: the side of the square crop; 0 for no crop, which requires images of equal size.
        shorter_side: the shorter side after resizing, before the crop; at least `image_size`.
        crop: the crop of training images; other images are cropped in the centre. "random": a
            square at a random position in the resized image; "random_resized": a random box of the
            original image, resized.
        workers: the number of processes that read ahead in training; 0 for threads of this process.
            The images do not depend on this number.
    """

    image_size: int = 0
    shorter_side: int = 0
    crop: Literal["centre", "random", "random_resized"] = "centre"
    workers: int = 0


UNCHANGED = Reading()  # images in their own size


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


def read_image(
    file: bytes,
    channels: int,
    reading: Reading = UNCHANGED,
    rng: np.random.Generator | None = None,
) -> Image.Image:
    """Returns an upright image with 8 bits per channel, resized and cropped.

    JPEG files much larger than needed are decoded at 1/2, 1/4 or 1/8 of their size, never below
    the size after resizing. Resizing is bilinear, with antialiasing.

    Args:
        file: the bytes of a PNG or JPEG file.
        channels: the number of channels.
        reading: the settings for resizing and cropping.
        rng: the generator for a random crop; None for a centred crop.
    """
    with Image.open(io.BytesIO(file), formats=("PNG", "JPEG")) as opened:
        image: Image.Image = opened
        side = reading.image_size
        if not side:
            return eight_bits(image, channels)
        if image.getexif().get(ExifTags.Base.Orientation, 1) > 1:
            image = eight_bits(image, channels)  # decodes it whole: `draft` has no effect
        width, height = image.size
        if rng is not None and reading.crop == "random_resized":
            box, size = random_box(width, height, rng), (side, side)
        else:
            shorter = reading.shorter_side or side
            scale = shorter / min(width, height)
            box = (0, 0, width, height)
            size = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
        reduction = max(1.0, min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]))
        least = (math.ceil(width / reduction), math.ceil(height / reduction))
        drafted = image.draft(None, least)  # None if the file is not a JPEG file
        share = drafted[1][2] / width if drafted else 1.0
        whole = eight_bits(image, channels)
    left, upper, right, lower = (share * edge for edge in box)
    resized = whole.resize(size, Image.Resampling.BILINEAR, box=(left, upper, right, lower))
    room = (size[0] - side, size[1] - side)
    x, y = (each // 2 if rng is None else int(rng.integers(each + 1)) for each in room)
    return resized.crop((x, y, x + side, y + side))


def random_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Returns a random box with 8 to 100 % of an image's area and an aspect ratio of 3/4 to 4/3.

    The area is uniformly and the aspect ratio log-uniformly distributed. If ten random boxes in a
    row do not fit into the image, the result is the largest centred box with an allowed aspect
    ratio. (Szegedy et al., Going deeper with convolutions, 2015; as in torchvision.)

    >>> random_box(300, 200, np.random.default_rng(0))
    (39, 84, 112, 181)
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        ratio = (4 / 3) ** rng.uniform(-1, 1)
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, upper = (int(rng.integers(room + 1)) for room in (width - across, height - down))
            break
    else:
        across, down = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, upper = (width - across) // 2, (height - down) // 2
    return left, upper, left + across, upper + down


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
