"""How batches for training reach the device."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bnjax.data.batches import Part, Rows, eval_batches, indices, take, train_rows
from bnjax.data.datasets import Split
from bnjax.data.records import Examples
from bnjax.types import Batch

# What the host ships for one step: a tree of arrays, of the same shapes for every step.
Item = Any


@dataclasses.dataclass(frozen=True)
class Feed:
    """Batches in two halves: what the host ships for a step, and what the device makes of it.

    Attributes:
        items: (seed, start) -> the items of the steps after `start`, for ever; what a step sees
            depends on the seed and the step alone, so that resuming is `items(seed, start)`.
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


WHOLE = Part()  # of a batch, on one device


def host_feed(split: Split, batch_size: int, *, shuffle: bool, part: Part = WHOLE) -> Feed:
    """Returns a feed that ships the batches' images, one step at a time."""

    def items(seed: int, start: int) -> Iterator[Batch]:
        for rows, about in _steps(split, batch_size, seed if shuffle else None, start, part):
            chosen = rows if part == WHOLE else np.asarray(about["index"])
            yield {**take(split, chosen), **about}

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
        steps = _steps(split, batch_size, seed if shuffle else None, start, part)
        return (about for _, about in steps)

    def batch(resident: Any, item: Any) -> Batch:
        (image, label), rows = resident, item["index"]
        images = image[rows].reshape(*rows.shape, *shape)
        return {"image": images, "label": label[rows], **item}

    return Feed(items, batch, (split.image.reshape(len(split.image), -1), split.label), max_steps)


def every_batch(split: Examples, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
    """Returns this process's part of the batches that have every example; see `eval_batches`."""
    if isinstance(split, Split):
        return map(part.of, eval_batches(split.image, split.label, batch_size))
    from bnjax.data import stream

    return stream.every_batch(split, batch_size, part)


def ship(feed: Feed, items: Sequence[Sequence[Item]]) -> tuple[Any, ...]:
    """Returns the items of several steps as the program takes them, to be handed over at once.

    With one step at a time that is one item, else [max_steps, ...], filled up, and the number of
    steps. With several seeds the items have an axis for them.

    Args:
        feed: whose items they are.
        items: one for each step and, in it, each seed.
    """
    joined = [_stack(of_seeds) if len(of_seeds) > 1 else of_seeds[0] for of_seeds in items]
    if feed.max_steps == 1:
        return (joined[0],)
    missing = feed.max_steps - len(items)
    return _stack([*joined, *[joined[-1]] * missing]), np.int32(len(items))


def _steps(
    split: Split, batch_size: int, seed: int | None, start: int, part: Part
) -> Iterator[tuple[Rows, Batch]]:
    """Returns the rows of each step, and `index`, `epoch` and perhaps `mask` of the part's."""
    examples = len(split.label)

    def about(rows: Rows, step: int) -> Batch:
        epoch = np.arange(step * batch_size, (step + 1) * batch_size) // examples
        numbers = {"index": indices(rows), "epoch": epoch}
        return part.of({name: one.astype(np.int32) for name, one in numbers.items()})

    rows = train_rows(examples, batch_size, seed=seed, start=start)
    return ((of_step, about(of_step, step)) for step, of_step in enumerate(rows, start))


def _stack(items: Sequence[Item]) -> Item:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *items)
