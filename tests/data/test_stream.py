"""Streams of records, against the same images in memory."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small_digits
import synthetic
from PIL import Image
from processes import losses, together
from records_folder import encode, picture, resized, write_dataset, write_file, write_folder

from bnjax.commands.predict import of_split
from bnjax.data import datasets
from bnjax.data.batches import WHOLE, Part, eval_batches
from bnjax.data.feed import every_batch, host_feed
from bnjax.data.pictures import Reading
from bnjax.errors import ConfigError, DataError, UserError, WorkerError
from bnjax.train import build
from bnjax.train.jsonl import read_lines
from bnjax.train.loop import train_and_evaluate
from bnjax.train.trained import Trained

MEMORY = synthetic.dataset()
SIZES = ((40, 30), (24, 24), (19, 57), (100, 21), (33, 32))
PLAIN, RANDOM = Reading(), Reading(16, 20, crop="random")


def batches(split, batch_size, count, *, shuffle=True, seed=3, start=0, part=WHOLE):
    """The first so many batches of a feed, of which only real rows are looked at."""
    items = host_feed(split, batch_size, shuffle=shuffle, part=part).items(seed, start)
    return [*itertools.islice(items, count)]


def assert_same(found, expected):
    """The same batches, but for what is in rows that fill up."""
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        real = one.get("mask", slice(None))
        for name in one:
            assert one[name].shape == other[name].shape
            np.testing.assert_array_equal(one[name][real], other[name][real])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The 48 and 20 images of `synthetic`, which are grey, in three shards each."""
    folder = write_dataset(tmp_path_factory.mktemp("records") / "same", MEMORY)
    # As TFDS describes them; without it images are RGB.
    image = {"image": {"shape": {"dimensions": ["8", "8", "1"]}, "dtype": "uint8"}}
    features = {"image": image, "label": {"classLabel": {"numClasses": "3"}}}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Images of different sizes, and the arrays that they are of."""
    rng = np.random.default_rng(5)
    arrays = [rng.integers(0, 256, (*SIZES[i % 5], 3), np.uint8) for i in range(15)]
    examples = [(picture(array), i % 4) for i, array in enumerate(arrays)]
    splits = {"train": examples, "validation": examples[:6]}
    return write_folder(tmp_path_factory.mktemp("photos"), splits, "abcd", shards=2), arrays


def load(folder, reading=PLAIN, **options):
    return datasets.load("records", str(folder), stream=reading, **options)


def test_splits_are_found_and_the_first_records_are_kept(folder, photos):
    data = load(folder)
    assert (data.name, data.label, data.classes) == ("records", "records", MEMORY.classes)
    assert (len(data.train), data.train.image_shape, len(data.test)) == (48, (8, 8, 1), 20)
    first = load(folder, train_images=9).train
    np.testing.assert_array_equal(first.select(slice(None)).image, MEMORY.train.image[:9])
    some = data.test.select(np.array([7, 2]))
    np.testing.assert_array_equal(some.label, MEMORY.test.label[[7, 2]])
    data = load(photos[0], Reading(16))  # the test split is "validation"
    assert (data.train.image_shape, len(data.train), len(data.test)) == ((16, 16, 3), 15, 6)


@pytest.mark.parametrize("part", [WHOLE, Part(8, 1, 2)])
@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_those_of_a_set_in_memory(folder, shuffle, part):
    """15 batches of 10 are more than three epochs of 48, none of which 10 divides."""
    splits = (load(folder).train, MEMORY.train)
    assert_same(*(batches(split, 10, 15, shuffle=shuffle, part=part) for split in splits))


def test_resuming_is_going_on_whatever_reads_ahead_and_a_lost_worker_ends_it(photos):
    records = load(photos[0], RANDOM).train
    whole = batches(records, 4, 9)
    assert_same(batches(records, 4, 4, start=5), whole[5:])
    assert not np.array_equal(batches(records, 4, 1, seed=8)[0]["image"], whole[0]["image"])
    processes = load(photos[0], dataclasses.replace(RANDOM, workers=1)).train
    items = host_feed(processes, 4, shuffle=True).items(3, 3)
    assert_same([*itertools.islice(items, 6)], whole[3:])
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="The same command resumes from the last checkpoint"):
        [*itertools.islice(items, 20)]


class Watched(list):
    """Records that remember which rows were read."""

    def __getitem__(self, row):
        self.rows.add(row)
        return super().__getitem__(row)


def test_the_parts_of_hosts_make_up_the_batch_and_none_reads_the_others(photos):
    whole, parts = load(photos[0], RANDOM).train.first(12), []
    sources = [Watched(map(whole.source.records.__getitem__, range(12))) for _ in range(4)]
    for i, records in enumerate(sources):
        records.rows = set()
        split = dataclasses.replace(
            whole, source=dataclasses.replace(whole.source, records=records)
        )
        parts.append(batches(split, 12, 4, shuffle=False, part=Part(4, i, 4)))
    joined = jax.tree.map(lambda *rows: np.concatenate(rows), *parts)
    assert_same(joined, batches(whole, 12, 4, shuffle=False))
    assert [source.rows for source in sources] == [{i, i + 1, i + 2} for i in range(0, 12, 3)]


def test_evaluation_sees_every_example_once(folder):
    for size in (8, 10):
        expected = [*eval_batches(MEMORY.test.image, MEMORY.test.label, size)]
        for part in (WHOLE, Part(2, 0, 2), Part(2, 1, 2)):
            found = [*every_batch(load(folder).test, size, part)]
            assert_same(found, [*map(part.of, expected)])


def test_crops_of_the_resized_image_are_in_the_middle_or_anew_each_time(photos):
    folder, arrays = photos
    middle = load(folder, Reading(16, 20)).train.select(slice(None)).image
    records = load(folder, RANDOM).train
    np.testing.assert_array_equal(next(every_batch(records, 15))["image"], middle)
    random = [batch["image"] for batch in batches(records, 15, 12, shuffle=False, seed=0)]
    places = []
    for array, *images in zip(arrays, middle, *random, strict=True):
        whole = np.asarray(resized(Image.fromarray(array), 20))
        windows = np.lib.stride_tricks.sliding_window_view(whole, (16, 16, 3))[:, :, 0]
        (first, *others) = (np.argwhere((windows == one).all((2, 3, 4))).tolist() for one in images)
        assert first == [[(side - 16) // 2 for side in whole.shape[:2]]]
        assert {*map(len, others)} == {1}
        places.append({tuple(one) for (one,) in others})
    # Of 25 places and more 12 draws hit 5 different ones or fewer with a chance of 1e-5.
    assert all(len(seen) > 5 for seen in places)
    # In square images, crops must reach both edges.
    assert {top for seen in places[1::5] for top, _ in seen} >= {0, 4}


BLACK = picture(np.zeros((8, 8, 3), np.uint8))
GOOD = encode(BLACK, 0)
HIGHER = encode(picture(np.zeros((9, 8, 3), np.uint8)), 0)


DAMAGED = {
    "truncated": ([GOOD, GOOD[:-40]], "record 1 of the train records in .* cannot be read"),
    "nothing": ([GOOD, b""], "it contains nothing, but it must be a tf.train.Example"),
    "no image": ([GOOD, encode(b"GIF89a", 0)], "record 1 .* cannot identify image"),
    "half an image": ([encode(BLACK[:45], 0)], "record 0 .* cannot"),
    "another size": ([GOOD, HIGHER], r"not all of one size .*image_size=N"),
    "too high a label": ([GOOD, encode(BLACK, 2)], "has the label 2; .* 0 to 1"),
    "no label": ([GOOD, encode(BLACK, -1)], "has the label -1"),
    "no records": ([], "the files are empty"),
    "no array_record": (b"nothing" * 100, r"train.array_record .* is not a complete array_record"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_records_and_files_are_named(what, tmp_path):
    records, message = DAMAGED[what]
    folder = write_folder(tmp_path, {"test": [(BLACK, 0)]}, "ab")
    file = folder / "train.array_record"
    file.write_bytes(records) if isinstance(records, bytes) else write_file(file, records)
    with pytest.raises(DataError, match=message):
        load(folder).train.select(slice(None))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-00000-of-00002.array_record", None, "has 1 files like train-00001-of-00002"),
        ("test-00000-of-00001.array_record", None, "no array_record files of train and test"),
        ("label.labels.txt", None, "Name the classes in a file .*label.labels.txt"),
        ("features.json", '{"featuresDict": {"features": {}}}', "holds no labelled images"),
    ],
)
def test_a_folder_that_is_no_set_says_why(name, content, said, tmp_path):
    folder = write_folder(tmp_path, {"train": [(BLACK, 0)] * 3}, "ab", shards=2)
    write_folder(folder, {"test": [(BLACK, 0)]}, "ab")
    (folder / name).write_text(content) if content else (folder / name).unlink()
    with pytest.raises(DataError, match=said):
        load(folder)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"config.data.dir = '' is invalid"):
        datasets.load("records", stream=PLAIN)
    with pytest.raises(DataError, match="has not been prepared"):
        datasets.load("mnist", str(tmp_path), stream=PLAIN)
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match=r"pip install 'bnjax\[stream\]'"):
        load(tmp_path)


def test_a_run_is_that_of_the_images_in_memory(folder, tmp_path):
    expected = synthetic.train(synthetic.config(), tmp_path / "memory")
    config = synthetic.config()
    config.data.name, config.data.dir, config.data.pipeline = "records", str(folder), "stream"
    found = train_and_evaluate(config, tmp_path / "stream", build.dataset(config))
    for key in ("steps", "final_test", "best_test", "steps_to_loss"):
        assert found[key] == expected[key]
    predicted = of_split(Trained(tmp_path / "stream", "last"), "test")
    assert predicted["accuracy"] == found["final_test"]["accuracy"]
    labels = [MEMORY.classes[label] for label in MEMORY.test.label]
    assert [row["label"] for row in predicted["predictions"]] == labels
    memory, stream = (tmp_path / name / "metrics.jsonl" for name in ("memory", "stream"))
    assert stream.read_text() == memory.read_text()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
def test_kills_change_nothing_and_leave_no_orphans(tmp_path):
    folder = write_dataset(tmp_path / "digits", datasets.load("digits"))

    def start(name, workers):
        keys = small_digits.STREAMED | {"data__dir": folder, "data__workers": workers}
        return together(tmp_path / name, 1, 1, *small_digits.steps(20, **keys))

    def is_worker(pid):
        with contextlib.suppress(OSError):
            return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()

    with start("killed", workers=2) as killed:
        killed.wait_for_checkpoint()
        # A thread of Grain's starts the workers.
        tasks = Path(f"/proc/{killed.processes[0].pid}/task").glob("*/children")
        children = [int(pid) for task in tasks for pid in task.read_text().split()]
        workers = [pid for pid in children if is_worker(pid)]
        assert len(workers) == 2
    assert len(read_lines(tmp_path / "killed" / "metrics.jsonl")) < 20
    until = time.monotonic() + 120
    while any(map(is_worker, workers)):
        assert time.monotonic() < until
        time.sleep(0.02)
    for name, workers in (("killed", 1), ("whole", 0)):
        with start(name, workers) as run:
            assert run.finish() == [0], run.said()
    resumed, whole = (tmp_path / name / "metrics.jsonl" for name in ("killed", "whole"))
    assert resumed.read_text() == whole.read_text()


@pytest.mark.slow
def test_each_of_two_processes_reads_its_part_only(tmp_path):
    """The images of the other process are black in its folder: rows 50 to 99 of each batch."""
    words = small_digits.steps(20, 10, **small_digits.STREAMED, train__shuffle=False)
    digits = datasets.load("digits")
    train, first = digits.train.first(1400), np.arange(1400) % 100 < 50
    folders = []
    for name, keeps in (("whole", first | ~first), ("first", first), ("second", ~first)):
        image = np.where(keeps.reshape(-1, 1, 1, 1), train.image, np.uint8(0))
        own = dataclasses.replace(digits, train=datasets.Split(image, train.label * keeps))
        write_dataset(tmp_path / name, own)
        folders.append([f"--config.data.dir={tmp_path / name}"])
    with together(tmp_path / "alone", 1, 1, *words, *folders[0]) as alone:
        assert alone.finish() == [0], alone.said()
    with together(tmp_path / "both", 2, 1, *words, own=folders[1:]) as both:
        assert both.finish() == [0, 0], both.said()
    mine, its = losses(tmp_path / "both"), losses(tmp_path / "alone")
    assert mine.keys() == its.keys()
    assert [*mine.values()] == pytest.approx([*its.values()], rel=1e-2)
