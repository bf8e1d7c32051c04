"""Folders of records, as the tests make them."""

import io

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from bnjax.data.records import encode


def picture(array, kind="png"):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(array.squeeze()).save(file, kind)
    return file.getvalue()


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
        name: [(picture(image), int(label)) for image, label in zip(*arrays, strict=True)]
        for name, arrays in {
            "train": (dataset.train.image, dataset.train.label),
            "test": (dataset.test.image, dataset.test.label),
        }.items()
    }
    return write_folder(folder, splits, dataset.classes, shards=3)
