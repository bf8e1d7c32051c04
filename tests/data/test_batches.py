import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnjax.data.batches import TrainRows, eval_batches, evenly_spaced
from bnjax.data.datasets import Split

SIZES = st.integers(1, 12)


def data(examples=12):
    """Images that tell which one they are: the label, in every pixel."""
    label = np.arange(examples, dtype=np.int32)
    return Split(np.full((3, 1, 2, examples), label, np.uint8).T, label)


def labels(steps, batch_size, seed):
    rows = TrainRows(12, batch_size, seed)
    return np.array([data().select(rows(step)).label for step in steps])


@given(st.permutations(range(12)), SIZES, st.integers(0, 1000) | st.none())
def test_a_step_has_its_rows_whichever_came_before_and_each_epoch_every_image(order, size, seed):
    epochs = labels(order, size, seed)[np.argsort(order)].reshape(size, 12)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(range(12), (size, 1)))
    # Whatever the batch size; without a seed as in the file.
    whole = labels(range(size), 12, seed)
    np.testing.assert_array_equal(epochs, np.sort(whole, axis=1) if seed is None else whole)


def test_seeds_and_epochs_have_different_orders():
    orders = [order for seed in (0, 1) for order in labels(range(4), 12, seed).tolist()]
    assert len({*map(tuple, orders)}) == 8


@pytest.mark.parametrize("batch_size", [-1, 0, 13])
def test_an_impossible_batch_size_is_refused(batch_size):
    with pytest.raises(ValueError, match="between 1 and the number of training images, 12"):
        TrainRows(12, batch_size, seed=None)


def test_evenly_spaced_examples_are_of_all_classes():
    assert [evenly_spaced(data(), n).label.tolist() for n in (4, 0)] == [[0, 3, 6, 9], []]


@given(examples=st.integers(1, 30), batch_size=st.integers(1, 40))
def test_evaluation_sees_every_image_once_in_order(examples, batch_size):
    seen, split = [], data(examples)
    for batch in eval_batches(split.image, split.label, batch_size):
        assert batch["image"].shape == (batch_size, 2, 1, 3)
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
        assert ("mask" in batch) == (examples % batch_size > 0)
        mask = batch.get("mask", np.ones(batch_size, bool))
        assert (mask.shape, mask.dtype) == ((batch_size,), np.bool_)
        expected = np.where(mask, batch["label"], 0)  # padding is black
        np.testing.assert_array_equal(batch["image"].T, np.full((3, 1, 2, batch_size), expected))
        seen.extend(batch["label"][mask])
    assert seen == list(range(examples))
