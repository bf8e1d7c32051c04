"""The order in which images are seen, and batches of one constant shape."""

from collections.abc import Iterator

import jax
import numpy as np

from bnjax.arrays import Batch
from bnjax.data.datasets import Split

# Which examples make a batch: their indices, or the slice that they are where nothing is shuffled.
Rows = slice | np.ndarray


def train_rows(
    examples: int, batch_size: int, *, key: jax.Array | None, start: int = 0
) -> Iterator[Rows]:
    """Yields the rows of batches for ever, from step `start` on; what a step sees depends on the key and the step alone.

    The examples are one endless stream, epoch after epoch, cut into full batches: nothing is dropped, no batch is
    small, and each example occurs once in each epoch. Where the batch size does not divide the number
    of examples, a batch spans the end of one epoch and the start of the next.

    Args:
        examples: how many there are.
        batch_size: at most as many.
        key: shuffles each epoch anew; None keeps the order of the data.
        start: number of batches that have been seen already.

    Raises:
        ValueError: if a batch is larger than the data.

    >>> import itertools
    >>> list(itertools.islice(train_rows(5, 2, key=None), 3))
    [slice(0, 2, None), slice(2, 4, None), array([4, 0])]
    """
    if not 0 < batch_size <= examples:
        raise ValueError(
            f"batch_size {batch_size} has to be between 1 and the number of training images, {examples}"
        )
    position = start * batch_size
    epoch, order = -1, np.arange(examples)

    def order_of(wanted: int) -> np.ndarray:
        nonlocal epoch, order
        if key is not None and wanted != epoch:
            epoch, order = (
                wanted,
                np.asarray(jax.random.permutation(jax.random.fold_in(key, wanted), examples)),
            )
        return order

    while True:
        first, offset = divmod(position, examples)
        last = offset + batch_size
        if key is None and last <= examples:
            yield slice(offset, last)  # a view: nothing is copied
        else:
            rows = order_of(first)[offset:last]
            yield (
                rows
                if last <= examples
                else np.concatenate([rows, order_of(first + 1)[: last - examples]])
            )
        position += batch_size


def take(split: Split, rows: Rows) -> Batch:
    """Returns the batch that the rows of a split make; of indices [k, n], k batches at once."""
    return {"image": split.image[rows], "label": split.label[rows]}


def indices(rows: Rows) -> np.ndarray:
    """Returns the rows as indices."""
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


def eval_batches(image: np.ndarray, label: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Yields every image once, in order; the last batch is padded, and `mask` (bool [batch_size]) says where.

    All batches have the same shapes and entries, so that a step compiles once; there is no `mask` where
    batch_size divides the number of images.
    """
    examples = len(label)
    for start in range(0, examples, batch_size):
        batch = {
            "image": image[start : start + batch_size],
            "label": label[start : start + batch_size],
        }
        real = len(batch["label"])
        if examples % batch_size:
            batch = {name: _pad(rows, batch_size) for name, rows in batch.items()}
            batch["mask"] = np.arange(batch_size) < real
        yield batch


def _pad(rows: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
