"""A labelled image as a `tf.train.Example`, the message that TensorFlow Datasets stores.

Of the message only what such an example has is understood, so that neither TensorFlow nor a
protobuf compiler is needed: https://protobuf.dev/programming-guides/encoding and TensorFlow's
`example.proto` and `feature.proto`.
"""

import itertools
from collections.abc import Iterator

# Kinds of fields, and what they have in front of them or are long.
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
BYTES_LIST, INT64_LIST = 1, 3  # of a Feature


def encode(image: bytes, label: int) -> bytes:
    """Returns the message of an image, as the bytes of a PNG or JPEG file, and its label.

    >>> decode(encode(b"PNG", 300))
    {'image': b'PNG', 'label': 300}
    """
    features = {
        "image": _field(BYTES_LIST, _field(1, image)),
        "label": _field(INT64_LIST, _field(1, _varint(label))),
    }
    entries = (_field(1, _field(1, name.encode()) + _field(2, of)) for name, of in features.items())
    return _field(1, b"".join(entries))


def decode(message: bytes) -> dict[str, bytes | int]:
    """Returns the first value of each feature that holds bytes or whole numbers.

    Raises:
        ValueError: if it is no such message.
    """
    found: dict[str, bytes | int] = {}
    for features in _all(memoryview(message), 1):
        for entry in _all(features, 1):
            name = b"".join(_all(entry, 1)).decode()
            for feature in _all(entry, 2):
                for kind, values in _fields(feature):
                    if kind not in (BYTES_LIST, INT64_LIST) or isinstance(values, int):
                        continue
                    for _, value in itertools.islice(_fields(values), 1):
                        found[name] = _number(value) if kind == INT64_LIST else bytes(value)
    return found


def _number(value: memoryview | int) -> int:
    """Returns the first of an Int64List's numbers, which may be packed; two's complement."""
    if not isinstance(value, int):
        value, _ = _read_varint(value, 0)
    return value - (1 << 64) if value >> 63 else value


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | LENGTH) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are two's complements
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _all(message: memoryview, number: int) -> Iterator[memoryview]:
    """Yields what is in the fields of a number."""
    for its, content in _fields(message):
        if its == number and not isinstance(content, int):
            yield content


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yields number and content of each field that is a whole number or has a length."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            value, at = _read_varint(message, at)
            yield number, value
            continue
        if kind == LENGTH:
            size, at = _read_varint(message, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"it has a field of the unknown kind {kind}")
        if at + size > len(message):
            raise ValueError("it ends in the middle of a field")
        if kind == LENGTH:
            yield number, message[at : at + size]
        at += size


def _read_varint(message: memoryview | bytes, at: int) -> tuple[int, int]:
    """Returns the whole number at a place, and the place after it."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value & ((1 << 64) - 1), at + i + 1
    raise ValueError("it ends in the middle of a number")
