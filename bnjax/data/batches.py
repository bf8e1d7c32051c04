"""Determines the order of training examples, and makes batches of constant shape."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from bnjax.data.datasets import Split
from bnjax.data.stream import Records
from bnjax.types import Batch

Examples = Split | Records


class TrainRows:
    """Computes the training rows that form the batch of any given step, int64 [batch_size].

    The rows depend only on the seed and the step. The examples form an endless stream of epochs,
    cut into full batches: nothing is dropped, and each example occurs once per epoch. If the batch
    size does not divide the number of examples, a batch may span two epochs.

    Args:
        examples: the number of examples.
        batch_size: the number of examples per batch, at most `examples`.
        seed: the seed for shuffling each epoch differently; None keeps the order of the data.

    Raises:
        ValueError: if a batch is larger than the data set.

    >>> rows = TrainRows(5, 2, seed=None)
    >>> [rows(step).tolist() for step in range(3)]
    [[0, 1], [2, 3], [4, 0]]
    """

    def __init__(self, examples: int, batch_size: int, seed: int | None):
        if not 0 < batch_size <= examples:
            raise ValueError(
                f"batch_size = {batch_size} must be between 1 and the number of training images, "
                f"{examples}"
            )
        self.examples, self.batch_size, self.seed = examples, batch_size, seed
        self._orders: dict[int, np.ndarray] = {}  # the orders of the latest epochs

    def __call__(self, step: int) -> np.ndarray:
        """Returns the rows of the next batch after `step` completed steps."""
        epoch, start = divmod(step * self.batch_size, self.examples)
        order, stop = self._order(epoch), start + self.batch_size
        if stop > self.examples:
            order = np.concatenate([order, self._order(epoch + 1)])
        return order[start:stop]

    def _order(self, epoch: int) -> np.ndarray:
        found = self._orders.get(epoch)
        if found is None:
            found = np.arange(self.examples)
            if self.seed is not None:
                # Computed on the host, because the device would first finish the current training
                # step.
                found = np.random.default_rng([self.seed, epoch]).permutation(self.examples)
            near = {one: order for one, order in self._orders.items() if abs(one - epoch) < 2}
            self._orders = near | {epoch: found}
        return found


def take(split: Examples, rows: slice | np.ndarray) -> Batch:
    """Returns the given rows of a split as a batch."""
    chosen = split.select(rows)
    return {"image": chosen.image, "label": chosen.label}


def evenly_spaced(split: Examples, count: int) -> Split:
    """Returns at most `count` evenly spaced examples; in a sorted split they cover all classes."""
    count = min(count, len(split))
    return split.select(np.arange(count) * len(split) // max(count, 1))


@dataclasses.dataclass(frozen=True)
class Part:
    """The part of every batch that one process loads; the parts have equal sizes.

    Attributes:
        multiple: batches are padded to a multiple of this number, so that they can be split evenly.
        index: the index of the process.
        count: the number of processes.
    """

    multiple: int = 1
    index: int = 0
    count: int = 1

    def of(self, batch: Batch) -> Batch:
        """Returns this process's part of a batch; `mask` is False for padding.

        >>> Part(multiple=4, index=1, count=2).of({"label": np.array([7, 8, 9])})
        {'label': array([9, 0]), 'mask': array([ True, False])}
        """
        real = len(next(iter(batch.values())))
        batch = _filled(batch, -(-real // self.multiple) * self.multiple)
        each = len(next(iter(batch.values()))) // self.count
        own = slice(self.index * each, (self.index + 1) * each)
        return {name: rows[own] for name, rows in batch.items()}


WHOLE = Part()  # the whole batch, for a single device


def eval_batches(image: np.ndarray, label: np.ndarray, batch_size: int) -> Iterator[Batch]:
    """Yields batches that contain every image once, in order; the last batch is padded.

    All batches have the same shapes and entries, so that a step is compiled only once. If
    batch_size does not divide the number of images, all batches have `mask`, bool [batch_size].
    """
    for start in range(0, len(label), batch_size):
        rows = slice(start, start + batch_size)
        batch = _filled({"image": image[rows], "label": label[rows]}, batch_size)
        if len(label) % batch_size:
            batch = {"mask": np.ones(batch_size, bool), **batch}
        yield batch


def _filled(batch: Batch, size: int) -> Batch:
    """Returns a batch padded with zeros to `size` examples; `mask` is False for padding."""
    real = len(next(iter(batch.values())))
    if real == size:
        return batch
    filled = {
        name: np.concatenate([rows, np.zeros((size - real, *rows.shape[1:]), rows.dtype)])
        for name, rows in batch.items()
    }
    return {**filled, "mask": filled.get("mask", np.arange(size) < real)}
