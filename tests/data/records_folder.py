"""Folders of records, as the tests make them."""

import io

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from bnjax.data.tfds import example


def picture(array, kind="png"):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, kind)
    return file.getvalue()


def encode(image, label):
    """A record of an image file and its label."""
    record = example()()
    record.features.feature["image"].bytes_list.value.append(image)
    record.features.feature["label"].int64_list.value.append(label)
    return record.SerializeToString(deterministic=True)


def write_file(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def write_folder(folder, splits, classes, shards=1):
    """Writes splits, {name: [(image file, label)]}, each in so many shards, and the classes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in classes))
    for split, examples in splits.items():
        records = [encode(*example) for example in examples]
        for shard, rows in enumerate(np.array_split(np.arange(len(records)), shards)):
            path = folder / f"{split}-{shard:05d}-of-{shards:05d}.array_record"
            write_file(path, [records[row] for row in rows])
    return folder


def write_dataset(folder, dataset):
    """Writes a data set that is in memory."""
    splits = {
        name: [
            (picture(image), int(label))
            for image, label in zip(split.image, split.label, strict=True)
        ]
        for name, split in (("train", dataset.train), ("test", dataset.test))
    }
    return write_folder(folder, splits, dataset.classes, shards=3)
