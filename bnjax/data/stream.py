"""Batches from records on disk, read ahead by threads or by processes: Grain does the work.

The unit of that work is a batch, and which examples it has follows from its number: so neither how
many workers there are nor which of them was lost changes anything in it.
"""

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import absl.flags
import numpy as np

from bnjax.data.batches import Part, TrainRows, eval_batches, indices
from bnjax.data.feed import WHOLE, Feed
from bnjax.data.records import Records
from bnjax.errors import WorkerError
from bnjax.types import Batch

THREADS = 2  # that read ahead in this process; each holds a batch
MOST_LOST = 3  # workers of a training: it goes on, but whatever kills them has to be looked at
LOST = "terminated unexpectedly"  # as Grain puts it


def stream_feed(records: Records, batch_size: int, *, shuffle: bool, part: Part = WHOLE) -> Feed:
    """Returns a feed that reads and decodes the batches' images while the device computes.

    Which examples a step sees is what it is for a split in memory, `train_rows`; a random crop
    depends on the seed and on the place of the example in the endless stream besides. An epoch's
    order takes 8 bytes an example in each process.

    Args:
        records: the training split.
        batch_size: of all processes together.
        shuffle: whether each epoch has an order of its own.
        part: the rows of each batch that this process loads.
    """

    def items(seed: int, start: int) -> Iterator[Batch]:
        rows = TrainRows(len(records), batch_size, seed if shuffle else None)
        crop = records.reading.crop
        drawn = seed if crop and crop.at_random else None

        def batches_after(step: int) -> Iterator[Batch]:
            source = _Batches(records, _Training(rows, batch_size, part), step, seed=drawn)
            return _read_ahead(source, records.reading.workers)

        return _going_on(batches_after, start)

    return Feed(items, lambda resident, item: item)


def every_batch(records: Records, batch_size: int, part: Part = WHOLE) -> Iterator[Batch]:
    """Yields what `eval_batches` does of a split in memory, this process's part of each batch.

    Threads read ahead: processes would have to be started each time.
    """
    rows = np.arange(len(records))
    batches = [
        part.of({"rows": one["image"], **_mask(one)})
        for one in eval_batches(rows, rows, batch_size)
    ]
    return _read_ahead(_Batches(records, batches.__getitem__, 0, len(batches)), 0)


@dataclasses.dataclass(frozen=True)
class _Training:
    """The rows of a step, and their positions in the endless stream of examples."""

    rows: TrainRows
    batch_size: int
    part: Part

    def __call__(self, step: int) -> Batch:
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        return self.part.of({"rows": indices(self.rows.of(step)), "position": positions})


@dataclasses.dataclass(frozen=True)
class _Batches:
    """A source as Grain takes it, whose elements are batches.

    Attributes:
        records: what is read.
        rows: (number of a batch) -> its "rows", "position" in the endless stream if it
            is for training, and "mask".
        start: the number of the first element.
        length: of the source.
        seed: of random crops; None: all are in the middle.
    """

    records: Records
    rows: Callable[[int], Batch]
    start: int
    length: int = sys.maxsize
    seed: int | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        chosen = self.rows(self.start + index)
        rows = np.asarray(chosen["rows"])
        image = np.zeros((len(rows), *self.records.image_shape), np.uint8)
        label = np.zeros(len(rows), np.int32)
        for i in np.flatnonzero(chosen.get("mask", np.ones(len(rows), bool))):
            rng = None
            if self.seed is not None:
                # 1: the orders of the epochs are drawn from two numbers.
                rng = np.random.default_rng([self.seed, int(chosen["position"][i]), 1])
            image[i], label[i] = self.records.read(int(rows[i]), rng)
        about = {}
        if "position" in chosen:
            epoch = np.asarray(chosen["position"]) // len(self.records)
            about = {"index": rows.astype(np.int32), "epoch": epoch.astype(np.int32)}
        return {"image": image, "label": label, **about, **_mask(chosen)}


def _mask(batch: Batch) -> Batch:
    return {"mask": batch["mask"]} if "mask" in batch else {}


def _read_ahead(source: _Batches, workers: int) -> Iterator[Batch]:
    """Yields the elements of a source in order."""
    import grain

    threads = 0 if workers else THREADS
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    batches: Any = grain.MapDataset.source(source).to_iter_dataset(reading)
    if workers:
        if not absl.flags.FLAGS.is_parsed():
            absl.flags.FLAGS.mark_as_parsed()  # Grain asks them, and this is no program of absl's
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
        batches = batches.mp_prefetch(processes, worker_init_fn=_begin_work)
    iterator = iter(batches)
    try:
        for batch in iterator:
            # Out of the memory shared with a worker, which Grain's arrays unmap when they go: what
            # the device still reads must not hang on that.
            yield {name: np.array(rows) for name, rows in batch.items()} if workers else batch
    finally:
        iterator.close()


def _begin_work(index: int, count: int) -> None:
    """Makes a worker live exactly as long as the training."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training, which ends it
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)  # what it waits for will never come

    threading.Thread(target=end_with_parent, daemon=True).start()


def _going_on(batches_after: Callable[[int], Iterator[Batch]], start: int) -> Iterator[Batch]:
    """Yields the batches of the steps after `start`; starts anew where a worker is lost.

    Raises:
        WorkerError: if more than `MOST_LOST` are.
    """
    step, lost = start, 0
    while True:
        try:
            for batch in batches_after(step):
                yield batch
                step += 1
        except RuntimeError as error:
            if LOST not in str(error):
                raise
            lost += 1
            reason = f"a process that read images ahead was lost before step {step + 1} ({error})"
            if lost > MOST_LOST:
                raise WorkerError(
                    f"{reason}, the {lost}th of this training. Often the memory does not suffice "
                    "and the system ends one of the processes: try fewer --config.data.workers or "
                    "a smaller --config.train.batch_size. The same command goes on from the last "
                    "checkpoint."
                ) from error
            print(f"\nWARNING: {reason}; others start and training goes on.\n", flush=True)
