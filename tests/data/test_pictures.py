import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from PIL import Image
from records_folder import picture

from bnjax.data.pictures import read_pictures
from bnjax.errors import DataError

SHAPE = (32, 32, 3)
RGB = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
GREY = RGB[..., 0]


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def read_one(content, path, shape=SHAPE):
    path.write_bytes(content)
    (found,) = read_pictures(path, shape)
    assert (found.name, found.image.shape) == (str(path), shape)
    assert found.image.dtype == np.float32
    return found


LEFT, TOP = np.arange(32)[None, :, None] < 16, np.arange(32)[:, None, None] < 16
PALETTE = Image.fromarray(RGB // 64 * 64).quantize(64)
HALVES = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P").resize((32, 32), 0)
HALVES.putpalette([10, 20, 30, 40, 50, 60])
DEEP = np.where(TOP, np.full(SHAPE, 128 * 257), 65535).astype(np.uint16)[..., 0]
CLEAR = np.where(GREY > 99, 255, 0).astype(np.uint8)[..., None]
UPSIDE_DOWN = Image.Exif()
UPSIDE_DOWN[0x0112] = 3
SMOOTH = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], SHAPE)
READ = {
    "a.png": (picture(RGB), RGB),
    "grey.png": (picture(GREY), GREY[..., None]),
    "palette.png": (picture(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "bits.png": (picture(GREY > 99), 255 * (GREY > 99)[..., None]),
    "clear.png": (picture(np.dstack([RGB, CLEAR])), np.where(CLEAR, RGB, 255)),
    "clear palette.png": (
        picture(HALVES, transparency=b"\x00\xff"),
        np.where(LEFT, 255, [40, 50, 60]),
    ),
    "16 bits.png": (picture(DEEP), np.where(TOP, 128, 255)),
    "photograph.png": (picture(RGB, exif=UPSIDE_DOWN), RGB[::-1, ::-1]),
    "uint8.npy": (npy(RGB), RGB),
    "flat.npy": (npy(GREY), GREY[..., None]),
    "float.npy": (npy(RGB.astype(np.float32) / 255), RGB),
    "big-endian.npy": (npy((RGB / 255).astype(">f8")), RGB),
    "one of many.npy": (npy(RGB[None]), RGB),
} | {
    f"{mode}.jpg": (picture(Image.fromarray(SMOOTH).convert(mode), "jpeg", quality=95), SMOOTH)
    for mode in ("RGB", "L", "CMYK")
}


@pytest.mark.parametrize("name", READ)
def test_pixels_are_those_of_the_file(name, tmp_path):
    content, expected = READ[name]
    shapes = [SHAPE, (32, 32, 1)] if expected.shape[-1] == 1 or "16" in name else [SHAPE]
    for shape in shapes:
        found = read_one(content, tmp_path / name, shape)
        wanted = np.broadcast_to(expected[..., : shape[2]], shape) / 255
        assert_allclose(found.image, wanted, atol=0.03 if "jpg" in name else 1e-6)
        assert found.note == ""


@pytest.mark.parametrize(("height", "width"), [(64, 96), (16, 8), (1, 1)])
def test_other_sizes_are_resized_with_a_note(height, width, tmp_path):
    halves = np.zeros((height, width, 3), np.uint8)
    halves[: height // 2, :, 0] = 255
    found = read_one(picture(halves), tmp_path / "a.png", (32, 20, 3))
    assert found.note == f"resized from {width}x{height} to 20x32"
    image = found.image
    assert 0 <= image.min() <= image.max() <= 1  # bicubic filters overshoot
    assert height == 1 or image[:14, :, 0].min() > 0.95
    assert image[18:].max() < 0.05


def test_npy_with_several(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([RGB, 255 - RGB]))
    one, two = read_pictures(tmp_path / "a.npy", SHAPE, name="mine")
    assert_allclose([one.image, two.image], np.stack([RGB, 255 - RGB]) / 255, atol=1e-6)
    assert (one.name, two.name) == ("mine[0]", "mine[1]")


def png_claiming(side):
    """A PNG file whose header gives another size than that of its pixels."""
    file = picture(RGB)
    header = file[12:16] + struct.pack(">II", side, side) + file[24:29]
    return file[:12] + header + struct.pack(">I", zlib.crc32(header)) + file[33:]


TERABYTES = npy(RGB).replace(b"(32, 32, 3), }" + b" " * 13, b"(1000000, 1000, 1000, 3), }")
REFUSED = {
    "missing.png": (None, "No such file"),
    "many pixels.png": (png_claiming(100), "it has more than 1,000 pixels"),
    "text.png": (b"hello", "neither a PNG nor a JPEG"),
    "truncated.png": (picture(RGB)[:-500], "truncated|broken"),
    "huge.png": (png_claiming(100_000), "10000000000 pixels"),
    "pickle.npy": (npy(np.array([[{}]], object)), "Python objects"),
    "terabytes.npy": (TERABYTES, "mmap length"),
    "nan.npy": (npy(np.full(SHAPE, np.nan, np.float32)), "nan"),
    "bright.npy": (npy(RGB.astype(np.float32)), "between 0 and 255; floats must be from 0 to 1"),
    "int.npy": (npy(RGB.astype(np.int64)), "int64, neither"),
    "flat.npy": (npy(GREY[0]), r"\(32,\) is not \[h, w\]"),
    "channels.npy": (npy(np.zeros((8, 8, 5), np.uint8)), "5 channels, but the network needs 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused(name, tmp_path):
    content, message = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:  # the size before it is decoded
        read_pictures(tmp_path / name, SHAPE, max_pixels=1000 if "many" in name else None)
    assert str(error.value).startswith(f"{tmp_path / name} cannot be read as an image: ")


@given(st.sampled_from(["png", "jpeg", "npy"]), st.integers(0, 4000), st.integers(0, 255))
def test_a_flipped_byte_is_an_error_or_harmless(tmp_path, kind, position, value):
    content = bytearray(npy(RGB) if kind == "npy" else picture(RGB, kind))
    content[position % len(content)] = value
    path, pictures = tmp_path / f"a.{kind}", []
    path.write_bytes(content)
    try:
        pictures = read_pictures(path, SHAPE)
    except DataError as error:
        assert str(path) in str(error)
    for found in pictures:
        assert found.image.shape == SHAPE
        assert 0 <= found.image.min() <= found.image.max() <= 1
