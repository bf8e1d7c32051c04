"""Folders of records, as the tests make them."""

import io

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from bnjax.data.tfds import example


def picture(image, kind="png", **options):
    """Returns the bytes of an image file with this array or Pillow image."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def resized(image, shorter):
    """By hand: the shorter side as asked for, the longer one in proportion, rounded."""
    size = [round(side * shorter / min(image.size)) for side in image.size]
    return image.resize(size, Image.Resampling.BILINEAR)


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
        name: list(zip(map(picture, split.image), split.label.tolist(), strict=True))
        for name, split in (("train", dataset.train), ("test", dataset.test))
    }
    return write_folder(folder, splits, dataset.classes, shards=3)
