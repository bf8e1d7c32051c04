"""Streams of records, against the same images in memory."""

import dataclasses
import io
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small_digits
import synthetic
from PIL import Image
from records_folder import picture, write_dataset, write_file, write_folder

from bnjax.commands.predict import Classifier
from bnjax.data import datasets, records
from bnjax.data.batches import Part, eval_batches
from bnjax.data.feed import every_batch, host_feed
from bnjax.data.records import Crop, Reading
from bnjax.data.stream import stream_feed
from bnjax.errors import ConfigError, DataError, UserError, WorkerError
from bnjax.train import build
from bnjax.train.loop import train_and_evaluate
from bnjax.train.rundir import read_lines
from bnjax.train.trained import Trained

MEMORY = synthetic.dataset()
SIZES = ((40, 30), (24, 24), (19, 57), (100, 21), (33, 32))


def take(items, count):
    taken = [
        {name: np.array(rows) for name, rows in one.items()}
        for one in itertools.islice(items, count)
    ]
    items.close()  # its workers end
    return taken


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The 48 and 20 images of `synthetic`, which are grey, in three shards each."""
    folder = write_dataset(tmp_path_factory.mktemp("records") / "same", MEMORY)
    # As TFDS describes them; without it images are RGB.
    features = {
        "image": {"image": {"shape": {"dimensions": ["8", "8", "1"]}, "dtype": "uint8"}},
        "label": {"classLabel": {"numClasses": "3"}},
    }
    content = {"featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Images of different sizes, and the arrays that they are of."""
    rng = np.random.default_rng(5)
    arrays = [rng.integers(0, 256, (*SIZES[i % 5], 3), np.uint8) for i in range(15)]
    examples = [(picture(array), i % 4) for i, array in enumerate(arrays)]
    splits = {"train": examples, "validation": examples[:6]}
    return write_folder(tmp_path_factory.mktemp("photos"), splits, "abcd", shards=2), arrays


def load(folder, crop=None, workers=0):
    return datasets.load("records", str(folder), stream=Reading(crop, workers))


def test_the_facts_of_a_set_need_no_arrays(folder, photos):
    data = load(folder)
    assert (data.name, data.label, data.classes) == ("records", "records", MEMORY.classes)
    assert data.train.image_shape == data.test.image_shape == (8, 8, 1)
    assert (len(data.train), len(data.test)) == (48, 20)
    data = load(photos[0], Crop(16, 20))
    assert data.train.image_shape == (16, 16, 3)
    assert (len(data.train), len(data.test)) == (15, 6)  # the test split is "validation"


def test_records_are_what_is_in_memory(folder):
    data = load(folder)
    for streamed, split in ((data.train, MEMORY.train), (data.test, MEMORY.test)):
        every = streamed.select(slice(None))
        np.testing.assert_array_equal(every.image, split.image)
        np.testing.assert_array_equal(every.label, split.label)
        some = streamed.select(np.array([7, 2]))
        np.testing.assert_array_equal(some.image, split.image[[7, 2]])
    first = datasets.load("records", str(folder), train_images=9, stream=Reading())
    assert len(first.train) == 9
    np.testing.assert_array_equal(first.train.select(slice(None)).image, MEMORY.train.image[:9])


@pytest.mark.parametrize("shuffle", [True, False])
def test_batches_are_those_of_a_set_in_memory(folder, shuffle):
    """15 batches of 10 are more than three epochs of 48, none of which 10 divides."""
    items = stream_feed(load(folder).train, 10, shuffle=shuffle).items(3, 0)
    found = take(items, 15)
    expected = host_feed(MEMORY.train, 10, shuffle=shuffle).items(3, 0)
    assert_same(found, [*itertools.islice(expected, 15)])


def test_each_example_once_an_epoch(folder):
    found = take(stream_feed(load(folder).train, 12, shuffle=True).items(1, 0), 8)
    rows = [image.tobytes() for batch in found for image in batch["image"]]
    every = {image.tobytes() for image in MEMORY.train.image}
    assert len(every) == 48
    assert set(rows[:48]) == set(rows[48:]) == every
    assert rows[:48] != rows[48:]


def test_resuming_is_going_on_whatever_reads_ahead(photos):
    crop = Crop(16, 20, at_random=True)

    def batches(workers, start):
        records = load(photos[0], crop, workers).train
        return stream_feed(records, 4, shuffle=True).items(7, start)

    whole = take(batches(0, 0), 9)
    assert_same(take(batches(0, 5), 4), whole[5:])
    assert_same(take(batches(2, 3), 6), whole[3:])
    another = take(stream_feed(load(photos[0], crop).train, 4, shuffle=True).items(8, 0), 9)
    assert not np.array_equal(another[0]["image"], whole[0]["image"])


@pytest.mark.parametrize("hosts", [2, 4])
def test_the_parts_of_hosts_make_up_the_batch(photos, hosts):
    records = load(photos[0], Crop(16, 20, at_random=True)).train
    whole = take(stream_feed(records, 12, shuffle=True).items(0, 0), 4)
    parts = [
        take(stream_feed(records, 12, shuffle=True, part=Part(4, i, hosts)).items(0, 0), 4)
        for i in range(hosts)
    ]
    assert {len(batch["label"]) for part in parts for batch in part} == {12 // hosts}
    joined = [
        {name: np.concatenate([one[name] for one in of_hosts]) for name in of_hosts[0]}
        for of_hosts in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_a_batch_that_hosts_do_not_divide_is_filled_up_and_masked(folder):
    records = load(folder).train
    whole = take(stream_feed(records, 10, shuffle=True).items(0, 0), 6)
    for i in range(2):
        part = Part(8, i, 2)
        for found, batch in zip(
            take(stream_feed(records, 10, shuffle=True, part=part).items(0, 0), 6),
            whole,
            strict=True,
        ):
            expected = part.of(batch)
            np.testing.assert_array_equal(found["mask"], expected["mask"])
            for name in ("image", "label"):
                np.testing.assert_array_equal(
                    found[name][found["mask"]], expected[name][expected["mask"]]
                )


def test_evaluation_sees_every_example_once(folder):
    test = load(folder).test
    for size in (8, 10):
        expected = [*eval_batches(MEMORY.test.image, MEMORY.test.label, size)]
        assert_same([*every_batch(test, size)], expected)
        for i in range(2):
            part = Part(2, i, 2)
            assert_same([*every_batch(test, size, part)], [*map(part.of, expected)])


def resized(array, shorter):
    """By hand: the shorter side as asked for, the longer one in proportion, rounded."""
    height, width = array.shape[:2]
    if height <= width:
        height, width = shorter, round(width * shorter / height)
    else:
        height, width = round(height * shorter / width), shorter
    image = Image.fromarray(array)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def test_images_are_resized_and_cropped_in_the_middle(photos):
    folder, arrays = photos
    found = load(folder, Crop(16, 20)).train.select(slice(None)).image
    for image, array in zip(found, arrays, strict=True):
        whole = resized(array, 20)
        top, left = (whole.shape[0] - 16) // 2, (whole.shape[1] - 16) // 2
        np.testing.assert_array_equal(image, whole[top : top + 16, left : left + 16])


def test_random_crops_are_places_in_the_resized_image_and_anew_each_time(photos):
    folder, arrays = photos
    records = load(folder, Crop(16, 20, at_random=True)).train
    batches = take(stream_feed(records, 15, shuffle=False).items(0, 0), 12)
    places = [set() for _ in arrays]
    for batch in batches:
        for image, array, seen in zip(batch["image"], arrays, places, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(resized(array, 20), (16, 16, 3))
            same = (windows[:, :, 0] == image).all(axis=(-3, -2, -1))
            assert same.sum() == 1
            seen.add(tuple(np.argwhere(same)[0]))
    # Of 25 places and more 12 draws hit 5 different ones or fewer with a chance of 1e-5.
    assert all(len(seen) > 5 for seen in places)
    tops = [place[0] for seen in places for place in seen]
    assert min(tops) == 0
    assert np.array_equal(  # evaluation draws nothing
        next(every_batch(records, 15))["image"],
        load(folder, Crop(16, 20)).train.select(slice(None)).image,
    )


def test_files_of_other_kinds_become_rgb(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (8, 8), np.uint8)
    clear = np.concatenate([np.zeros((8, 8, 3)), np.full((8, 8, 1), 0)], -1).astype(np.uint8)
    colours = Image.fromarray(np.stack([grey] * 3, -1)).quantize(8)
    palette = io.BytesIO()
    colours.save(palette, "png")
    smooth = np.add.outer(np.arange(8), np.arange(8)).astype(np.uint8)[..., None] * [[[9, 5, 2]]]
    jpeg = picture(smooth.astype(np.uint8), "jpeg")
    files = [picture(grey), picture(clear), palette.getvalue(), jpeg]
    folder = write_folder(
        tmp_path, {split: [(one, 0) for one in files] for split in ("train", "test")}, "a"
    )
    image = load(folder).train.select(slice(None)).image
    np.testing.assert_array_equal(image[0], np.stack([grey] * 3, -1))
    assert (image[1] == 255).all()  # clear pixels show white
    np.testing.assert_array_equal(image[2], np.asarray(colours.convert("RGB")))
    np.testing.assert_array_equal(image[3], np.asarray(Image.open(io.BytesIO(jpeg))))


GOOD = records.encode(picture(np.zeros((8, 8, 3), np.uint8)), 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"no message at all", "record 1 of the train records in .* cannot be read"),
        (GOOD[:-40], "record 1 .* cannot be read"),
        (b"", "it holds nothing and has to be a tf.train.Example with an 'image'"),
        (records.encode(b"GIF89a", 0), "record 1 .* cannot identify image"),
        (records.encode(picture(np.zeros((8, 8, 3), np.uint8))[:45], 0), "record 1 .* cannot"),
        (
            records.encode(picture(np.zeros((9, 8, 3), np.uint8)), 0),
            r"not all of one size .*image_size=N",
        ),
        (records.encode(picture(np.zeros((8, 8, 3), np.uint8)), 2), "has the label 2; .* 0 to 1"),
        (records.encode(picture(np.zeros((8, 8, 3), np.uint8)), -1), "has the label -1"),
    ],
)
def test_a_damaged_record_is_named(record, message, tmp_path):
    folder = write_folder(tmp_path, {"test": [(picture(np.zeros((8, 8, 3), np.uint8)), 0)]}, "ab")
    write_file(folder / "train.array_record", [GOOD, record])
    records = load(folder).train
    with pytest.raises(DataError, match=message):
        next(stream_feed(records, 2, shuffle=False).items(0, 0))


def spoil(folder, what):
    shard, *_ = sorted(folder.glob("train*"))
    if what == "shard":
        shard.unlink()
    elif what == "damaged":
        shard.write_bytes(b"nothing" * 100)
    elif what == "no test":
        for path in folder.glob("test*"):
            path.unlink()
    elif what == "empty":
        for path in folder.glob("train*"):
            write_file(path, [])
    elif what == "classes":
        (folder / "label.labels.txt").unlink()
    elif what == "features":
        (folder / "features.json").write_text('{"featuresDict": {"features": {"audio": {}}}}')


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("shard", "has 1 files like train-00001-of-00002.array_record, and not the 00002"),
        ("damaged", "train-00000-of-00002.array_record .* is no whole array_record file"),
        ("no test", r"has no array_record files of train and test \(or validation\), but label"),
        ("empty", "the files are empty"),
        ("classes", "Name the classes in a file .*label.labels.txt"),
        ("features", "holds no labelled images that bnjax can read"),
    ],
)
def test_a_folder_that_is_no_set_says_why(what, message, tmp_path):
    one = [(picture(np.zeros((8, 8, 3), np.uint8)), 0)] * 3
    folder = write_folder(tmp_path, {"train": one, "test": one}, "ab", shards=2)
    spoil(folder, what)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        load(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config.data.dir = '' is not possible"):
        datasets.load("records", stream=Reading())
    with pytest.raises(DataError, match="has not been prepared"):
        datasets.load("mnist", str(tmp_path), stream=Reading())
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError, match=r"pip install 'bnjax\[stream\]'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"data.workers": 2},
            "workers = 2 .* Allowed: 0 with data.pipeline = 'memory'",
        ),
        ({"data.name": "records"}, "config.data.pipeline = 'memory'"),
        ({"data.pipeline": "stream", "data.random_crop": True}, "with data.image_size = 0"),
        (
            {"data.pipeline": "stream", "data.image_size": 32, "data.shorter_side": 31},
            "config.data.image_size, 32, or above",
        ),
    ],
)
def test_keys_that_do_not_go_together(keys, message):
    config = synthetic.config()
    config.update_from_flattened_dict(keys)
    with pytest.raises(ConfigError, match=message):
        build.dataset(config)


def kill_worker():
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


def test_after_a_worker_is_lost_training_goes_on_exactly(folder, capsys):
    feed = stream_feed(load(folder, workers=1).train, 10, shuffle=True)
    items = feed.items(3, 0)
    found = [next(items)]
    kill_worker()
    found += take(items, 9)
    assert_same(
        found, [*itertools.islice(host_feed(MEMORY.train, 10, shuffle=True).items(3, 0), 10)]
    )
    assert "was lost before step" in capsys.readouterr().out


@pytest.mark.slow
def test_workers_that_are_lost_again_and_again_end_it(folder, monkeypatch):
    monkeypatch.setattr("bnjax.data.stream.MOST_LOST", 0)
    items = stream_feed(load(folder, workers=1).train, 10, shuffle=True).items(3, 0)
    next(items)
    kill_worker()
    with pytest.raises(WorkerError, match="The same command goes on from the last checkpoint"):
        [*itertools.islice(items, 20)]


def config_of(folder, workers=0):
    config = synthetic.config()
    config.data.name, config.data.dir, config.data.pipeline = "records", str(folder), "stream"
    config.data.workers = workers
    return config


def test_a_run_is_that_of_the_images_in_memory_and_stopping_changes_nothing(folder, tmp_path):
    """Stopped by a record that is damaged while it trains, and gone on with when it is mended."""
    expected = train_and_evaluate(synthetic.config(), tmp_path / "memory", MEMORY)
    config = config_of(folder)
    data = build.dataset(config)

    class Damaged:
        """Breaks when the 75th image is read."""

        reads = itertools.count()

        def __len__(self):
            return 48

        def __getitem__(self, row):
            return data.train.source[row] if next(self.reads) < 75 else b""

    broken = dataclasses.replace(data, train=dataclasses.replace(data.train, source=Damaged()))
    with pytest.raises(DataError, match="record"):
        train_and_evaluate(config, tmp_path / "stopped", broken)
    steps = [line["step"] for line in read_lines(tmp_path / "stopped" / "metrics.jsonl")]
    assert 5 <= max(steps) < 12
    # Who reads is no part of what a run is.
    found = train_and_evaluate(config_of(folder, workers=1), tmp_path / "stopped", data)
    for key in ("steps", "final_test", "best_test", "steps_to_loss"):
        assert found[key] == expected[key]
    predicted = Classifier(Trained(tmp_path / "stopped", "last"), None).of_split("test", None)
    assert predicted["accuracy"] == found["final_test"]["accuracy"]
    assert [row["label"] for row in predicted["predictions"]] == [
        MEMORY.classes[label] for label in MEMORY.test.label
    ]
    memory, stopped = (tmp_path / name / "metrics.jsonl" for name in ("memory", "stopped"))
    assert stopped.read_text() == memory.read_text()


def command(folder, workdir, workers):
    words = small_digits.steps(20, **small_digits.STREAMED, data__dir=folder, data__workers=workers)
    config = small_digits.CONFIG
    start = [sys.executable, "-m", "bnjax.main", "--config", config, "--workdir", workdir]
    return subprocess.Popen([*start, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def children(process):
    """The workers; a thread of Grain's starts them."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    found = [int(one) for task in tasks for one in task.read_text().split()]
    return [one for one in found if b"spawn_main" in command_line(one)]


def command_line(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc")
def test_kills_change_nothing(tmp_path):
    """A worker is killed and training goes on; then all of it, and the same command resumes."""
    folder = write_dataset(tmp_path / "digits", datasets.load("digits"))
    with command(folder, tmp_path / "whole", 0) as whole:
        assert whole.wait(300) == 0, whole.stdout.read()
    expected = (tmp_path / "whole" / "metrics.jsonl").read_text()

    lines = tmp_path / "killed" / "metrics.jsonl"
    with command(folder, tmp_path / "killed", 2) as process:
        wait_for(lambda: len(children(process)) == 2)
        os.kill(children(process)[1], signal.SIGKILL)
        wait_for(lambda: list((tmp_path / "killed" / "checkpoints").glob("1*")))
        workers = children(process)
        process.kill()
        process.wait(60)
        assert workers
    assert len(lines.read_text().splitlines()) < 20
    wait_for(lambda: not any(b"spawn_main" in command_line(one) for one in workers))  # no orphans
    with command(folder, tmp_path / "killed", 1) as process:
        assert process.wait(300) == 0, process.stdout.read()
    assert lines.read_text() == expected
