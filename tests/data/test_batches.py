import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnjax.data.batches import TrainRows, eval_batches, evenly_spaced, take
from bnjax.data.datasets import Split

EXAMPLES = 12
SIZES = st.integers(1, EXAMPLES)


def data(examples=EXAMPLES):
    """Images that tell which one they are: the label, in every pixel."""
    label = np.arange(examples, dtype=np.int32)
    image = label.astype(np.uint8)[:, None, None, None]
    return Split(np.broadcast_to(image, (examples, 2, 3, 1)).copy(), label)


def labels(steps, batch_size, seed, examples=EXAMPLES):
    rows = TrainRows(examples, batch_size, seed)
    batches = [take(data(examples), rows(step)) for step in steps]
    for batch in batches:
        assert batch["image"].shape == (batch_size, 2, 3, 1)
        assert batch["image"].dtype == np.uint8
        assert (batch["image"] == batch["label"][:, None, None, None]).all()
    return np.concatenate([batch["label"] for batch in batches])


@given(batch_size=SIZES, start=st.integers(0, 50), examples=st.integers(EXAMPLES, 20))
def test_file_order_is_the_data_again_and_again(batch_size, start, examples):
    seen = labels(range(start, start + 7), batch_size, None, examples)
    expected = np.arange(start * batch_size, (start + 7) * batch_size) % examples
    np.testing.assert_array_equal(seen, expected)


@given(batch_size=SIZES, seed=st.integers(0, 1000))
def test_each_epoch_has_every_image_once_in_an_order_that_the_seed_decides(batch_size, seed):
    steps = range(-(-4 * EXAMPLES // batch_size))
    epochs = labels(steps, batch_size, seed)[: 4 * EXAMPLES].reshape(4, EXAMPLES)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(EXAMPLES), (4, 1)))
    whole = labels(range(4), EXAMPLES, seed)  # whatever the batch size
    np.testing.assert_array_equal(epochs.ravel(), whole)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert (whole != labels(range(4), EXAMPLES, seed + 1)).any()


@given(st.permutations(range(12)), SIZES, st.integers(0, 1000) | st.none())
def test_a_step_has_the_same_rows_whichever_came_before(order, batch_size, seed):
    found = labels(order, batch_size, seed).reshape(12, -1)
    in_order = labels(range(12), batch_size, seed).reshape(12, -1)
    np.testing.assert_array_equal(found, in_order[order])


@pytest.mark.parametrize("batch_size", [-1, 0, EXAMPLES + 1])
def test_an_impossible_batch_size_is_refused(batch_size):
    with pytest.raises(ValueError, match="between 1 and the number of training images, 12"):
        TrainRows(EXAMPLES, batch_size, seed=None)


def test_evenly_spaced_examples_are_of_all_classes():
    assert evenly_spaced(data(), 4).label.tolist() == [0, 3, 6, 9]
    assert len(evenly_spaced(data(), 0)) == 0


@given(examples=st.integers(1, 30), batch_size=st.integers(1, 40))
def test_evaluation_sees_every_image_once_in_order(examples, batch_size):
    seen, split = [], data(examples)
    for batch in eval_batches(split.image, split.label, batch_size):
        assert batch["image"].shape == (batch_size, 2, 3, 1)
        assert (batch["image"].dtype, batch["label"].dtype) == (np.uint8, np.int32)
        assert ("mask" in batch) == (examples % batch_size > 0)
        mask = batch.get("mask", np.ones(batch_size, bool))
        assert (mask.shape, mask.dtype) == ((batch_size,), np.bool_)
        assert not batch["image"][~mask].any()
        assert (batch["image"][mask] == batch["label"][mask][:, None, None, None]).all()
        seen.extend(batch["label"][mask])
    assert seen == list(range(examples))
