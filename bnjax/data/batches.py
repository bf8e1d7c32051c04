"""The order in which images are seen, and batches of one constant shape."""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from bnjax.data.datasets import Split
from bnjax.data.records import Examples
from bnjax.types import Array, Batch

# Which examples make a batch: their indices, or the slice that they are where nothing is shuffled.
Rows = slice | np.ndarray


def train_rows(
    examples: int, batch_size: int, *, seed: int | None, start: int = 0
) -> Iterator[Rows]:
    """Returns the rows of batches for ever, from step `start` on.

    What a step sees depends on the seed and the step alone. The examples are one endless stream,
    epoch after epoch, cut into full batches: nothing is dropped, no batch is small, and each
    example occurs once in each epoch. Where the batch size does not divide the number of examples,
    a batch spans the end of one epoch and the start of the next.

    Args:
        examples: how many there are.
        batch_size: at most as many.
        seed: shuffles each epoch anew; None keeps the order of the data.
        start: number of batches that have been seen already.

    Raises:
        ValueError: if a batch is larger than the data.

    >>> import itertools
    >>> list(itertools.islice(train_rows(5, 2, seed=None), 3))
    [slice(0, 2, None), slice(2, 4, None), array([4, 0])]
    """
    rows = TrainRows(examples, batch_size, seed)
    return map(rows.of, itertools.count(start))


class TrainRows:
    """The rows of the batch of each step, in any order of the steps; see `train_rows`."""

    def __init__(self, examples: int, batch_size: int, seed: int | None):
        """Draws nothing yet."""
        if not 0 < batch_size <= examples:
            raise ValueError(
                f"batch_size {batch_size} has to be between 1 and the number of training images, "
                f"{examples}"
            )
        self._examples, self._batch_size, self._seed = examples, batch_size, seed
        self._orders: dict[int, np.ndarray] = {}  # of the latest epochs

    def of(self, step: int) -> Rows:
        """Returns the rows of the batch after so many steps."""
        epoch, offset = divmod(step * self._batch_size, self._examples)
        end = offset + self._batch_size
        if self._seed is None and end <= self._examples:
            return slice(offset, end)  # a view: nothing is copied
        if end <= self._examples:
            return self._order_of(epoch)[offset:end]
        after = self._order_of(epoch + 1)[: end - self._examples]
        return np.concatenate([self._order_of(epoch)[offset:], after])

    def _order_of(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(self._examples)
        found = self._orders.get(epoch)
        if found is None:
            # On the host: a permutation on the device would wait for the step that runs there.
            found = np.random.default_rng([self._seed, epoch]).permutation(self._examples)
            near = {one: order for one, order in self._orders.items() if abs(one - epoch) < 2}
            self._orders = near | {epoch: found}
        return found


def take(split: Examples, rows: Rows) -> Batch:
    """Returns the batch that the rows of a split make."""
    chosen = split.select(rows)
    return {"image": chosen.image, "label": chosen.label}


@dataclasses.dataclass(frozen=True)
class Part:
    """Which examples of every batch one process loads.

    Attributes:
        multiple: batches are filled up to a multiple of it; the number of devices.
        index: of the process.
        count: of the processes, among which each batch is divided up equally.
    """

    multiple: int = 1
    index: int = 0
    count: int = 1

    def of(self, batch: Batch) -> Batch:
        """Returns this process's part; where the batch has been filled up `mask` is False.

        >>> Part(multiple=4, index=1, count=2).of({"label": np.array([7, 8, 9])})
        {'label': array([9, 0]), 'mask': array([ True, False])}
        """
        real = len(next(iter(batch.values())))
        size = -(-real // self.multiple) * self.multiple
        if size > real:
            batch = {name: _pad(rows, size) for name, rows in batch.items()}
            batch = {**batch, "mask": batch.get("mask", np.arange(size) < real)}
        each = size // self.count
        return {
            name: rows[self.index * each : (self.index + 1) * each] for name, rows in batch.items()
        }


def indices(rows: Rows) -> np.ndarray:
    """Returns the rows as indices."""
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows


def spread(split: Examples, count: int) -> Split:
    """Returns so many examples at equal distances: a split may be sorted by class."""
    return split.select(np.arange(count) * len(split) // max(count, 1))


def eval_batches(image: np.ndarray, label: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Yields every image once, in order.

    The last batch is padded, and `mask` (bool [batch_size]) says where.

    All batches have the same shapes and entries, so that a step compiles once; there is no `mask`
    where batch_size divides the number of images.
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


def _pad(rows: Array, size: int) -> np.ndarray:
    return np.concatenate([rows, np.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
