import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnjax.data.batches import eval_batches, take, train_rows
from bnjax.data.datasets import Split

EXAMPLES = 12
SIZES = st.integers(1, EXAMPLES)


def data(examples=EXAMPLES):
    """Images that tell which one they are: the label, in every pixel."""
    label = np.arange(examples, dtype=np.int32)
    return np.broadcast_to(
        label.astype(np.uint8)[:, None, None, None], (examples, 2, 3, 1)
    ).copy(), label


def labels(count, batch_size, *, seed=None, start=0, examples=EXAMPLES):
    split = Split(*data(examples))
    batches = [
        take(split, rows)
        for rows in itertools.islice(
            train_rows(examples, batch_size, seed=seed, start=start), count
        )
    ]
    for batch in batches:
        assert set(batch) == {"image", "label"}
        assert batch["image"].shape == (batch_size, 2, 3, 1)
        assert batch["image"].dtype == np.uint8
        assert (batch["image"] == batch["label"][:, None, None, None]).all()
    return np.concatenate([batch["label"] for batch in batches])


@given(batch_size=SIZES, start=st.integers(0, 50), examples=st.integers(EXAMPLES, 20))
def test_file_order_is_the_data_again_and_again(batch_size, start, examples):
    seen = labels(7, batch_size, start=start, examples=examples)
    np.testing.assert_array_equal(
        seen, np.arange(start * batch_size, (start + 7) * batch_size) % examples
    )


@given(batch_size=SIZES, seed=st.integers(0, 1000))
def test_each_epoch_has_every_image_once(batch_size, seed):
    count = -(-4 * EXAMPLES // batch_size)
    epochs = labels(count, batch_size, seed=seed)[: 4 * EXAMPLES].reshape(4, EXAMPLES)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(EXAMPLES), (4, 1)))


@given(batch_size=SIZES, seed=st.integers(0, 1000), start=st.integers(0, 30), shuffle=st.booleans())
def test_start_is_the_same_as_skipping(batch_size, seed, start, shuffle):
    order = seed if shuffle else None
    np.testing.assert_array_equal(
        labels(3, batch_size, seed=order, start=start),
        labels(start + 3, batch_size, seed=order)[start * batch_size :],
    )


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    one, again, other = (labels(2, EXAMPLES, seed=seed).reshape(2, EXAMPLES) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert (one[0] != one[1]).any()
    assert (one[0] != np.arange(EXAMPLES)).any()
    np.testing.assert_array_equal(labels(4, 6, seed=1), one.ravel())  # whatever the batch size


def test_file_order_copies_nothing_but_where_epochs_meet():
    image, label = data()
    batches = [
        take(Split(image, label), rows)
        for rows in itertools.islice(train_rows(EXAMPLES, 5, seed=None), 12)
    ]
    shared = [
        np.shares_memory(batch["image"], image) and np.shares_memory(batch["label"], label)
        for batch in batches
    ]
    assert shared == [step * 5 // EXAMPLES == (step * 5 + 4) // EXAMPLES for step in range(12)]


@pytest.mark.parametrize("batch_size", [-1, 0, EXAMPLES + 1])
def test_an_impossible_batch_size_is_refused(batch_size):
    with pytest.raises(ValueError, match=rf"batch_size {batch_size} .* 1 and .* {EXAMPLES}"):
        next(train_rows(EXAMPLES, batch_size, seed=None))


@given(examples=st.integers(0, 20), batch_size=st.integers(1, 25))
def test_evaluation_has_every_image_once_in_order(examples, batch_size):
    image, label = data(examples)
    batches = list(eval_batches(image, label, batch_size))
    assert len(batches) == -(-examples // batch_size)
    seen = []
    for batch in batches:
        assert (batch["image"].shape, batch["label"].shape) == (
            (batch_size, 2, 3, 1),
            (batch_size,),
        )
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
        assert ("mask" in batch) == (examples % batch_size > 0)
        mask = batch.get("mask", np.ones(batch_size, bool))
        assert (mask.shape, mask.dtype) == ((batch_size,), np.bool_)
        assert not batch["image"][~mask].any()
        assert (batch["image"][mask] == batch["label"][mask][:, None, None, None]).all()
        seen.extend(batch["label"][mask])
    assert seen == list(range(examples))
