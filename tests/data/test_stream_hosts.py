"""Two processes train together from records, of which each reads its part only."""

import dataclasses

import numpy as np
import pytest
import small_digits
from processes import losses, together
from records_folder import write_dataset

from bnjax.data import datasets
from bnjax.data.datasets import Split

pytestmark = pytest.mark.slow

# Batches are cut from the same place of each epoch: rows 0 to 49 of a hundred are process 0's.
IMAGES, BATCH = 1400, 100
WORDS = small_digits.steps(20, 10, **small_digits.STREAMED, train__shuffle=False)


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


def test_each_process_reads_its_part(tmp_path, folders):
    with together(tmp_path / "alone", 1, 1, *WORDS, f"--config.data.dir={folders[0]}") as alone:
        assert alone.finish() == [0], alone.said()
    own = [[f"--config.data.dir={folder}"] for folder in folders[1:]]
    with together(tmp_path / "both", 2, 1, *WORDS, own=own) as both:
        assert both.finish() == [0, 0], both.said()
    mine, its = losses(tmp_path / "both"), losses(tmp_path / "alone")
    assert mine.keys() == its.keys()
    assert [*mine.values()] == pytest.approx([*its.values()], rel=1e-2)
