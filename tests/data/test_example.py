"""The message that examples are stored as, against protobuf's own reading and writing of it."""

import contextlib

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from bnjax.data import records

INT64 = st.integers(-(2**63), 2**63 - 1)


def example_class():
    """The class of tf.train.Example, described as TensorFlow's records.proto and feature.proto."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name, *fields):
        added = file.message_type.add(name=name)
        for number, (its, label, kind, of) in enumerate(fields, 1):
            added.field.add(name=its, number=number, label=label, type=kind, type_name=of)
        return added

    one, many, nested = field.LABEL_OPTIONAL, field.LABEL_REPEATED, field.TYPE_MESSAGE
    message("BytesList", ("value", many, field.TYPE_BYTES, None))
    message("FloatList", ("value", many, field.TYPE_FLOAT, None))
    message("Int64List", ("value", many, field.TYPE_INT64, None))
    lists = ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")
    message("Feature", *((its, one, nested, f".t.{of}") for its, of in lists))
    features = message("Features", ("feature", many, nested, ".t.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry", options={"map_entry": True})
    entry.field.add(name="key", number=1, label=one, type=field.TYPE_STRING)
    entry.field.add(name="value", number=2, label=one, type=nested, type_name=".t.Feature")
    message("Example", ("features", one, nested, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = example_class()


@given(st.binary(max_size=300), INT64)
def test_protobuf_reads_what_is_written(image, label):
    feature = EXAMPLE.FromString(records.encode(image, label)).features.feature
    assert list(feature["image"].bytes_list.value) == [image]
    assert list(feature["label"].int64_list.value) == [label]


@given(st.binary(max_size=300), st.lists(INT64, min_size=1, max_size=3), st.text(max_size=5))
def test_what_protobuf_writes_is_read(image, numbers, name):
    message = EXAMPLE()
    feature = message.features.feature
    feature["a"].float_list.value.extend([1.5, 2.5])
    feature["image"].bytes_list.value.append(image)
    feature[f"other {name}"].bytes_list.value.extend([name.encode(), b"second"])
    feature["label"].int64_list.value.extend(numbers)
    feature["nothing"].int64_list.SetInParent()
    assert records.decode(message.SerializeToString()) == {
        "image": image,
        f"other {name}": name.encode(),
        "label": numbers[0],
    }


def test_numbers_that_are_not_packed():
    # As proto2 writes them: a field for each.
    unpacked = b"\n\x11\n\x0f\n\x05label\x12\x06\x1a\x04\x08\x07\x08\x09"
    assert list(EXAMPLE.FromString(unpacked).features.feature["label"].int64_list.value) == [7, 9]
    assert records.decode(unpacked) == {"label": 7}


WHOLE = records.encode(b"x" * 40, 3)


@given(st.binary(max_size=60) | st.integers(0, len(WHOLE)).map(lambda end: WHOLE[:end]))
def test_damage_is_told_and_nothing_else(message):
    """What protobuf refuses may pass, since not all is looked at; what it reads has to."""
    try:
        EXAMPLE.FromString(message)
    except DecodeError:
        with contextlib.suppress(ValueError):
            records.decode(message)
    else:
        assert isinstance(records.decode(message), dict)
