"""Transfers training batches to the device."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bnjax.data.batches import WHOLE, Examples, Part, TrainRows, eval_batches, take
from bnjax.data.datasets import Split
from bnjax.data.stream import Records, read_ahead
from bnjax.types import Batch

# The host's input for one step: a tree of arrays, with the same shapes in every step.
Item = Any


@dataclasses.dataclass(frozen=True)
class Feed:
    """A source of training batches, with a host part (`items`) and a device part (`batch`).

    Attributes:
        items: a function (seed, start) that returns an endless iterator over the items of all steps
            from `start` on. An item depends only on the seed and the step, so that training can
            resume with `items(seed, start)`.
        batch: a pure function (resident, item) that returns the batch of a step and is compiled
            into the step. In addition to the entries for `train_step`, the batch may have two
            entries for augmentation: `index` int [n], the position of each example in the training
            data, and `epoch` int [n].
        resident: a tree of arrays that stay on the device during training.
        max_steps: the maximum number of steps in one call of the program.
    """

    items: Callable[[int, int], Iterator[Item]]
    batch: Callable[[Any, Item], Batch]
    resident: Any = ()
    max_steps: int = 1


def host_feed(split: Examples, batch_size: int, *, shuffle: bool, part: Part = WHOLE) -> Feed:
    """Returns a feed that transfers the images of each batch, one step at a time.

    Records are read and decoded while the device computes. A random crop depends on the seed and on
    the position of the example in the endless stream of epochs. In each process, the order of an
    epoch takes 8 bytes of memory per example.

    Args:
        split: the training split.
        batch_size: the batch size over all processes.
        shuffle: whether to shuffle each epoch.
        part: the rows of each batch that this process loads.
    """

    def items(seed: int, start: int) -> Iterator[Batch]:
        rows = TrainRows(len(split), batch_size, seed if shuffle else None)
        load = functools.partial(_load, split, rows, part, seed)
        if isinstance(split, Records):
            return read_ahead(load, start, sys.maxsize, split.reading.workers)
        return map(load, itertools.count(start))

    return Feed(items, lambda resident, item: item)


def resident_feed(
    split: Split, batch_size: int, *, shuffle: bool, max_steps: int, part: Part = WHOLE
) -> Feed:
    """Returns a feed that transfers only indices; the images stay on the device as uint8.

    Each image is stored as a flat row. With shape [h, w, c], a TPU would pad the 3 channels and
    copy all images into that layout in each dispatch.
    """
    shape = split.image.shape[1:]

    def items(seed: int, start: int) -> Iterator[Item]:
        rows = TrainRows(len(split), batch_size, seed if shuffle else None)
        return map(functools.partial(_numbers, rows, part), itertools.count(start))

    def batch(resident: Any, item: Any) -> Batch:
        (image, label), rows = resident, item["index"]
        images = image[rows].reshape(*rows.shape, *shape)
        return {"image": images, "label": label[rows], **item}

    return Feed(items, batch, (split.image.reshape(len(split.image), -1), split.label), max_steps)


def every_batch(split: Examples, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
    """Yields this process's part of batches that cover every example; see `eval_batches`."""
    if isinstance(split, Split):
        return map(part.of, eval_batches(split.image, split.label, batch_size))
    rows = np.arange(len(split))  # row numbers, so that each process reads only its own images
    parts = [*map(part.of, eval_batches(rows, rows, batch_size))]

    def load(number: int) -> Batch:
        return {**parts[number], **take(split, np.asarray(parts[number]["image"]))}

    return read_ahead(load, 0, len(parts), workers=0)  # starting processes each time would be slow


def ship(feed: Feed, items: Sequence[Sequence[Item]]) -> tuple[Any, ...]:
    """Converts the items of several steps to the arguments of the compiled program.

    If `max_steps` is 1, the only argument is the item. Otherwise the arguments are the items,
    padded to [max_steps, ...], and the number of steps. With several seeds, the items have an axis
    for the seeds.

    Args:
        feed: the feed that the items come from.
        items: for each step, one item per seed.
    """
    joined = [_stack(of_seeds) if len(of_seeds) > 1 else of_seeds[0] for of_seeds in items]
    if feed.max_steps == 1:
        return (joined[0],)
    missing = feed.max_steps - len(items)
    return _stack([*joined, *[joined[-1]] * missing]), np.int32(len(items))


def _numbers(rows: TrainRows, part: Part, step: int) -> Batch:
    """Returns `index` and `epoch` for one part of a step's batch, and `mask` if it is padded."""
    epoch = _positions(rows, step) // rows.examples
    return part.of({"index": rows(step).astype(np.int32), "epoch": epoch.astype(np.int32)})


def _positions(rows: TrainRows, step: int) -> np.ndarray:
    """Returns the positions of a step's examples in the endless stream of epochs."""
    return np.arange(step * rows.batch_size, (step + 1) * rows.batch_size)


def _load(split: Examples, rows: TrainRows, part: Part, seed: int, step: int) -> Batch:
    """Loads one part of a step's batch."""
    numbers = _numbers(rows, part, step)
    index = np.asarray(numbers["index"])
    if isinstance(split, Records) and split.reading.crop != "centre":
        places = np.asarray(part.of({"position": _positions(rows, step)})["position"])
        # The 1 keeps these seeds distinct from those of the epoch orders, which have two numbers.
        chosen = split.select(index, [np.random.default_rng([seed, i, 1]) for i in places])
    else:
        chosen = split.select(index)
    return {"image": chosen.image, "label": chosen.label, **numbers}


def _stack(items: Sequence[Item]) -> Item:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)
