import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bnjax.data.pictures import read_pictures
from bnjax.errors import DataError

SHAPE = (32, 32, 3)
RGB = np.random.default_rng(0).integers(0, 256, SHAPE, np.uint8)
GREY = RGB[..., 0]


def encode(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read_one(content, path, shape=SHAPE):
    path.write_bytes(content)
    (picture,) = read_pictures(path, shape)
    assert picture.name == str(path)
    assert picture.image.shape == shape
    assert picture.image.dtype == np.float32
    return picture


def assert_pixels(picture, expected):
    np.testing.assert_allclose(
        picture.image, np.broadcast_to(expected, picture.image.shape) / 255, atol=1e-6
    )
    assert picture.note == ""


def test_png(tmp_path):
    path = tmp_path / "a.png"
    assert_pixels(read_one(encode(Image.fromarray(RGB)), path), RGB)
    assert_pixels(read_one(encode(Image.fromarray(GREY)), path), GREY[..., None])
    assert_pixels(read_one(encode(Image.fromarray(GREY)), path, (32, 32, 1)), GREY[..., None])
    palette = Image.fromarray(RGB // 64 * 64).quantize(64)
    assert_pixels(read_one(encode(palette), path), np.asarray(palette.convert("RGB")))
    assert_pixels(read_one(encode(Image.fromarray(GREY > 99)), path), 255 * (GREY > 99)[..., None])


def test_what_is_transparent_is_white(tmp_path):
    rgba = np.dstack([RGB, np.where(GREY > 99, 255, 0).astype(np.uint8)])
    white = np.where(rgba[..., 3:] > 0, RGB, 255)
    assert_pixels(read_one(encode(Image.fromarray(rgba)), tmp_path / "a.png"), white)
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), mode="P").resize((32, 32), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    picture = read_one(encode(palette, transparency=b"\x00\xff"), tmp_path / "a.png")
    assert_pixels(picture, np.where(np.arange(32)[None, :, None] < 16, 255, [40, 50, 60]))


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_keep_their_brightness(channels, tmp_path):
    deep = np.full((32, 32), 65535, np.uint16)
    deep[:16] = 128 * 257
    picture = read_one(encode(Image.fromarray(deep)), tmp_path / "a.png", (32, 32, channels))
    assert_pixels(picture, np.where(np.arange(32)[:, None, None] < 16, 128, 255))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg(mode, tmp_path):
    smooth = np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], SHAPE)
    picture = read_one(
        encode(Image.fromarray(smooth).convert(mode), "jpeg", quality=95), tmp_path / "a.jpg"
    )
    np.testing.assert_allclose(picture.image, smooth / 255, atol=0.03)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    picture = read_one(encode(Image.fromarray(RGB), exif=exif), tmp_path / "a.png")
    assert_pixels(picture, RGB[::-1, ::-1])


def test_the_content_counts_and_not_the_name(tmp_path):
    assert_pixels(read_one(encode(Image.fromarray(RGB)), tmp_path / "a.jpg"), RGB)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (16, 8), (1, 1), (32, 31)])
def test_other_sizes_are_resized_with_a_note(height, width, tmp_path):
    colours = np.array([0, 127, 255], np.uint8)
    picture = read_one(
        encode(Image.fromarray(np.broadcast_to(colours, (height, width, 3)))), tmp_path / "a.png"
    )
    np.testing.assert_allclose(picture.image, np.broadcast_to(colours / 255, SHAPE), atol=1e-6)
    assert picture.note == f"resized from {width}x{height} to 32x32"


def test_resizing_keeps_orientation_and_range(tmp_path):
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:32, :, 0] = 255
    image = read_one(encode(Image.fromarray(halves)), tmp_path / "a.png").image
    assert (image.min(), image.max()) == (0, 1)  # bicubic filters overshoot
    assert image[:14, :, 0].min() > 0.95
    assert image[18:].max() < 0.05


NPY = {
    "uint8 hwc": (RGB, RGB),
    "uint8 hw": (GREY, GREY[..., None]),
    "uint8 hw1": (GREY[..., None], GREY[..., None]),
    "float32": (RGB.astype(np.float32) / 255, RGB),
    "float64, big-endian": ((RGB / 255).astype(">f8"), RGB),
    "fortran": (np.asfortranarray(RGB), RGB),
    "one of many": (RGB[None], RGB),
}


@pytest.mark.parametrize("kind", NPY)
def test_npy(kind, tmp_path):
    array, expected = NPY[kind]
    np.save(tmp_path / "a.npy", array)
    (picture,) = read_pictures(tmp_path / "a.npy", SHAPE)
    assert_pixels(picture, expected)


def test_npy_with_several(tmp_path):
    np.save(tmp_path / "a.npy", np.stack([RGB, 255 - RGB]))
    one, two = read_pictures(tmp_path / "a.npy", SHAPE)
    assert_pixels(two, 255 - RGB)
    assert (one.name, two.name) == (f"{tmp_path}/a.npy[0]", f"{tmp_path}/a.npy[1]")


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npy_header(text):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def png_claiming(width, height):
    def chunk(kind, content):
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size)
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


with io.BytesIO() as _buffer:
    np.savez(_buffer, a=RGB)
    NPZ = _buffer.getvalue()
REFUSED = {
    "text.png": (b"hello", "neither a PNG nor a JPEG"),
    "empty.png": (b"", "neither a PNG nor a JPEG"),
    "other.png": (encode(Image.fromarray(RGB), "gif"), "neither a PNG nor a JPEG"),
    "truncated.png": (encode(Image.fromarray(RGB))[:-500], "truncated|broken"),
    "truncated.jpg": (encode(Image.fromarray(RGB), "jpeg")[:-200], "truncated|broken"),
    "header.png": (encode(Image.fromarray(RGB))[:20], "neither|[Tt]runcated"),
    "huge.png": (png_claiming(100_000, 100_000), "10000000000 pixels"),
    "big.png": (png_claiming(10_000, 10_000), "100000000 pixels"),
    "text.npy": (b"hello", "magic"),
    "empty.npy": (b"", "not a whole .npy file"),
    "zip.npy": (NPZ, "magic"),
    "pickle.npy": (npy(np.array([[{}]], object)), "Python objects"),
    "terabytes.npy": (
        npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000, 1000, 3), }"),
        "mmap length",
    ),
    "negative.npy": (
        npy_header("{'descr': '|u1', 'fortran_order': False, 'shape': (-8, 8, 3), }") + bytes(192),
        "cannot be read",
    ),
    "code.npy": (npy_header("__import__('os').abort()"), "not a whole .npy file"),
    "truncated.npy": (npy(RGB)[:-1], "mmap length"),
    "nan.npy": (npy(np.full(SHAPE, np.nan, np.float32)), "nan"),
    "bright.npy": (npy(RGB.astype(np.float32)), "between 0 and 255; floats have to be from 0 to 1"),
    "negative-values.npy": (npy(np.full(SHAPE, -0.1)), "between -0.1"),
    "int.npy": (npy(RGB.astype(np.int64)), "int64, neither"),
    "complex.npy": (npy(RGB.astype(np.complex64)), "complex64, neither"),
    "flat.npy": (npy(GREY[0]), r"\(32,\) is not \[h, w\]"),
    "none.npy": (npy(RGB[:0]), "cannot be read"),
    "five.npy": (npy(np.zeros((2, 2, 2, 2, 2), np.uint8)), "is not"),
    "channels.npy": (npy(np.zeros((8, 8, 5), np.uint8)), "5 channels and the network takes 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_image_is_refused(name, tmp_path):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_pictures(tmp_path / name, SHAPE)
    assert str(error.value).startswith(f"{tmp_path / name} cannot be read as an image: ")


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_what_is_no_file_is_refused(suffix, tmp_path):
    with pytest.raises(DataError, match="No such file"):
        read_pictures(tmp_path / f"missing{suffix}", SHAPE)
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(DataError, match="Is a directory"):
        read_pictures(tmp_path / f"folder{suffix}", SHAPE)


@given(
    kind=st.sampled_from(["png", "jpeg", "npy"]),
    position=st.integers(0, 4000),
    value=st.integers(0, 255),
)
def test_a_flipped_byte_is_an_error_or_harmless(kind, position, value, tmp_path):
    content = bytearray(npy(RGB) if kind == "npy" else encode(Image.fromarray(RGB), kind))
    content[position % len(content)] = value
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    pictures, message = [], str(path)
    try:
        pictures = read_pictures(path, SHAPE)
    except DataError as error:
        message = str(error)
    assert str(path) in message
    assert all(
        picture.image.shape == SHAPE and 0 <= picture.image.min() <= picture.image.max() <= 1
        for picture in pictures
    )
