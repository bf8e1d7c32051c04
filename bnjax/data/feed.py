"""How batches for training reach the device."""

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

# What the host ships for one step: a tree of arrays, of the same shapes for every step.
Item = Any


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches in two halves: what the host ships for a step, and what the device makes of it.

    Attributes:
        items: (seed, start) -> the items of the steps after `start`, for ever; they depend on the
            seed and the step alone, so that resuming is `items(seed, start)`.
        batch: (resident, item) -> the batch of a step; pure, and compiled into the step. Beside
            what `train_step` takes it may have, for augmentation, `index` int [n] of each example
            in the training set, and the `epoch` int [n] that it is in.
        resident: a tree of arrays that lie on the device for all steps.
        max_steps: how many items may be shipped at once.
    """

    items: Callable[[int, int], Iterator[Item]]
    batch: Callable[[Any, Item], Batch]
    resident: Any = ()
    max_steps: int = 1


def host_feed(split: Examples, batch_size: int, *, shuffle: bool, part: Part = WHOLE) -> Feed:
    """Returns a feed that ships the batches' images, one step at a time.

    Records are read and decoded while the device computes. A random crop depends on the seed and on
    the place of the example in the endless stream. The order of an epoch takes 8 bytes an example
    in each process.

    Args:
        split: the training split.
        batch_size: of all processes together.
        shuffle: whether each epoch has an order of its own.
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
    """Returns a feed that ships indices: the images lie on the device, as uint8.

    An image is one row there: as [h, w, c] a TPU would pad the 3 channels, and copy all images
    into that layout in each dispatch.
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
    """Returns this process's part of the batches that have every example; see `eval_batches`."""
    if isinstance(split, Split):
        return map(part.of, eval_batches(split.image, split.label, batch_size))
    rows = np.arange(len(split))  # in place of images, so that each process reads only its own
    parts = [*map(part.of, eval_batches(rows, rows, batch_size))]

    def load(number: int) -> Batch:
        return {**parts[number], **take(split, np.asarray(parts[number]["image"]))}

    return read_ahead(load, 0, len(parts), workers=0)  # processes would have to start each time


def ship(feed: Feed, items: Sequence[Sequence[Item]]) -> tuple[Any, ...]:
    """Returns the items of several steps as the program takes them, to be handed over at once.

    With one step at a time that is one item, else [max_steps, ...], filled up, and the number of
    steps. With several seeds the items have an axis for them.

    Args:
        feed: the feed of the items.
        items: one for each step and, in it, each seed.
    """
    joined = [_stack(of_seeds) if len(of_seeds) > 1 else of_seeds[0] for of_seeds in items]
    if feed.max_steps == 1:
        return (joined[0],)
    missing = feed.max_steps - len(items)
    return _stack([*joined, *[joined[-1]] * missing]), np.int32(len(items))


def _numbers(rows: TrainRows, part: Part, step: int) -> Batch:
    """Returns `index` and `epoch` of the part's examples in a step, and perhaps `mask`."""
    epoch = _positions(rows, step) // rows.examples
    return part.of({"index": rows(step).astype(np.int32), "epoch": epoch.astype(np.int32)})


def _positions(rows: TrainRows, step: int) -> np.ndarray:
    """Returns the places of a step's examples in the endless stream."""
    return np.arange(step * rows.batch_size, (step + 1) * rows.batch_size)


def _load(split: Examples, rows: TrainRows, part: Part, seed: int, step: int) -> Batch:
    """Returns the part's batch of a step."""
    numbers = _numbers(rows, part, step)
    index = np.asarray(numbers["index"])
    if isinstance(split, Records) and split.reading.random_crop:
        places = np.asarray(part.of({"position": _positions(rows, step)})["position"])
        # 1: the orders of the epochs are drawn from two numbers.
        chosen = split.select(index, [np.random.default_rng([seed, i, 1]) for i in places])
    else:
        chosen = split.select(index)
    return {"image": chosen.image, "label": chosen.label, **numbers}


def _stack(items: Sequence[Item]) -> Item:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)
