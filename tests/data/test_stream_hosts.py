"""Two processes train together from records, of which each reads its part only."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import small_digits
from processes import losses, together
from records_folder import write_dataset

from bnjax.data import datasets
from bnjax.data.datasets import Split

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc").exists(), reason="finds the workers in /proc"),
]

# Batches are cut from the same place of each epoch: rows 0 to 49 of a hundred are process 0's.
IMAGES, BATCH, STEPS = 1400, 100, 200
WORDS = small_digits.steps(STEPS, 50, **small_digits.STREAMED, train__shuffle=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """All images; and for each process a folder in which the other's are black."""
    folder, digits = tmp_path_factory.mktemp("records"), datasets.load("digits")
    image, label = digits.train.image[:IMAGES], digits.train.label[:IMAGES]
    first = np.arange(IMAGES) % BATCH < BATCH // 2
    made = []
    for name, keeps in (("whole", first | ~first), ("first", first), ("second", ~first)):
        own = Split(image * keeps.reshape(-1, 1, 1, 1).astype(image.dtype), label * keeps)
        made.append(write_dataset(folder / name, dataclasses.replace(digits, train=own)))
    return made


def two(workdir, folders, workers):
    own = [[f"--config.data.dir={folder}"] for folder in folders[1:]]
    return together(workdir, 2, 1, *WORDS, f"--config.data.workers={workers}", own=own)


def test_each_process_reads_its_part_and_kills_change_nothing(tmp_path, folders):
    with together(tmp_path / "alone", 1, 1, *WORDS, f"--config.data.dir={folders[0]}") as alone:
        assert alone.finish() == [0], alone.said()
    with two(tmp_path / "whole", folders, 0) as whole:
        assert whole.finish() == [0, 0], whole.said()
    mine, its = losses(tmp_path / "whole"), losses(tmp_path / "alone")
    assert mine.keys() == its.keys()
    early = [key for key in its if key[0] <= 20]
    assert [mine[key] for key in early] == pytest.approx([its[key] for key in early], rel=1e-2)

    workdir = tmp_path / "killed"
    with two(workdir, folders, 1) as killed:
        killed.wait_for_checkpoint()
        killed.processes[1].kill()
        assert 0 not in killed.finish(timeout=120), killed.said()
    assert max(step for step, _ in losses(workdir)) < STEPS
    with two(workdir, folders, 1) as resumed:
        assert resumed.finish() == [0, 0], resumed.said()
    metrics = [path / "metrics.jsonl" for path in (workdir, tmp_path / "whole")]
    assert metrics[0].read_text() == metrics[1].read_text()
