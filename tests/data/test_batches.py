import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnjax.data.batches import TrainRows, eval_batches, evenly_spaced
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
    batches = [data(examples).select(rows(step)) for step in steps]
    for batch in batches:
        assert batch.image.shape == (batch_size, 2, 3, 1)
        assert (batch.image == batch.label[:, None, None, None]).all()
    return np.concatenate([batch.label for batch in batches])


@given(st.permutations(range(12)), SIZES, st.integers(0, 1000) | st.none())
def test_a_step_has_its_rows_whichever_came_before_and_each_epoch_every_image(order, size, seed):
    steps = labels(order, size, seed).reshape(12, size)[np.argsort(order)]
    epochs = steps.reshape(size, EXAMPLES)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(range(EXAMPLES), (size, 1)))
    # Whatever the batch size; without a seed as in the file.
    whole = labels(range(size), EXAMPLES, seed).reshape(size, EXAMPLES)
    np.testing.assert_array_equal(epochs, np.sort(whole, axis=1) if seed is None else whole)


def test_seeds_and_epochs_have_different_orders():
    orders = np.concatenate([labels(range(4), EXAMPLES, seed).reshape(4, -1) for seed in (0, 1)])
    assert len({tuple(order) for order in orders}) == 8


def test_a_batch_may_span_epochs_of_data_that_it_does_not_divide():
    np.testing.assert_array_equal(labels(range(3), 5, None, 7), np.arange(15) % 7)


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
