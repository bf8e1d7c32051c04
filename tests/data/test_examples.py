"""Examples as tf.train.Example, against the bytes of protobuf's wire format."""

import pytest

from bnjax.data import records

# Field 1, length-delimited (tag 0x0a): Features, its map entries, their keys and values; of a
# Feature bytes_list is field 1 and int64_list (packed) field 3.
WIRE = (
    b"\x0a\x22"
    b"\x0a\x10\x0a\x05image\x12\x07\x0a\x05\x0a\x03PNG"
    b"\x0a\x0e\x0a\x05label\x12\x05\x1a\x03\x0a\x01\x07"
)


def test_examples_are_the_published_wire_format():
    assert records.encode(b"PNG", 7) == WIRE
    assert records.decode(WIRE) == {"image": b"PNG", "label": 7}


def test_values_that_are_no_bytes_and_no_whole_numbers_are_left_out():
    floats = b"\x0a\x0f\x0a\x0d\x0a\x01f\x12\x08\x12\x06\x0a\x04\x00\x00\x80\x3f"
    assert records.decode(floats) == {}
    assert records.decode(records.encode(b"", -1)) == {"image": b"", "label": -1}


@pytest.mark.parametrize("damaged", [WIRE[:-3], b"\xff" * 20])
def test_damage_is_told(damaged):
    with pytest.raises(ValueError, match=r"no tf\.train\.Example"):
        records.decode(damaged)
