"""How many steps are handed to the device at once, and where it finds the images."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.arrays import Array, Batch, BatchStats
from bnjax.data.batches import Rows, indices, take
from bnjax.data.datasets import Split
from bnjax.metrics import Metrics
from bnjax.train.xla import Options, memory
from bnjax.train_step import TrainState

# A step with its statics bound.
Step = Callable[[TrainState, BatchStats, Batch], tuple[TrainState, BatchStats, Metrics]]
# As many steps as there are rows; the metrics have a leading axis, one entry a step and perhaps some that mean nothing.
Advance = Callable[[TrainState, BatchStats, list[Rows]], tuple[TrainState, BatchStats, Metrics]]

MOST = 100  # steps a dispatch
SHARE = 0.25  # of a device's memory, that the training images may fill


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Takes steps: `advance` takes one for each entry of its rows, of which there may be at most `most`."""

    advance: Advance
    most: int


def build(step: Step, split: Split, options: Options) -> Dispatch:
    """Returns the way of taking steps that is fast on the default backend.

    On a CPU that is one a dispatch: many in one program are ten times slower there (jax-ml/jax#12868). An accelerator
    would wait for the host between steps, and gets many, and the images once for all.

    Args:
        step: is compiled.
        split: the training images.
        options: for the compiler.
    """
    if jax.default_backend() == "cpu" or split.image.nbytes > SHARE * (memory() or float("inf")):
        return one_at_a_time(step, split, options)
    return many_at_a_time(step, split, options)


def one_at_a_time(step: Step, split: Split, options: Options) -> Dispatch:
    """Returns a dispatch of one step, whose batch comes from the host."""

    def one(
        state: TrainState, batch_stats: BatchStats, batch: Batch
    ) -> tuple[TrainState, BatchStats, Metrics]:
        state, batch_stats, metrics = step(state, batch_stats, batch)
        return state, batch_stats, jax.tree.map(lambda leaf: leaf[None], metrics)

    compiled = jax.jit(one, donate_argnums=(0, 1), compiler_options=options)

    def advance(
        state: TrainState, batch_stats: BatchStats, rows: list[Rows]
    ) -> tuple[TrainState, BatchStats, Metrics]:
        (only,) = rows
        return compiled(state, batch_stats, take(split, only))

    return Dispatch(advance, most=1)


def many_at_a_time(step: Step, split: Split, options: Options, most: int = MOST) -> Dispatch:
    """Returns a dispatch of up to `most` steps in one program, over images that lie on the device as uint8.

    The number of steps is an argument of the program, so that it is compiled once, and a step's bits do not depend
    on how many others it was dispatched with.
    """
    image, label = jax.device_put((split.image.reshape(len(split.image), -1), split.label))
    program = many_steps(step, split.image.shape[1:], most)
    compiled = jax.jit(program, donate_argnums=(0, 1), compiler_options=options)

    def advance(
        state: TrainState, batch_stats: BatchStats, rows: list[Rows]
    ) -> tuple[TrainState, BatchStats, Metrics]:
        some = np.stack([indices(of_step) for of_step in rows]).astype(np.int32)
        padded = np.concatenate([some, np.zeros((most - len(rows), *some.shape[1:]), np.int32)])
        return compiled(
            state, batch_stats, image, label, *jax.device_put((padded, np.int32(len(rows))))
        )

    return Dispatch(advance, most)


def many_steps(
    step: Step, shape: tuple[int, ...], most: int
) -> Callable[..., tuple[TrainState, BatchStats, Metrics]]:
    """Returns the program of `many_at_a_time`, to be compiled.

    It takes state, batch_stats, image [examples, h * w * c], label [examples], rows int [most, n] and count int [], how
    many of the rows are steps. An image is one row there: as [h, w, c] a TPU would pad the 3 channels, and copy all images into
    that layout in each dispatch.

    Args:
        step: with its statics bound.
        shape: of an image, [h, w, c].
        most: the number of rows.
    """

    def loop(
        state: TrainState,
        batch_stats: BatchStats,
        image: Array,
        label: Array,
        rows: Array,
        count: Array,
    ) -> tuple[TrainState, BatchStats, Metrics]:
        def batch_of(i: Any) -> Batch:
            return {
                "image": image[rows[i]].reshape(*rows.shape[1:], *shape),
                "label": label[rows[i]],
            }

        def body(i: Any, carry: Any) -> Any:
            state, batch_stats, metrics = carry
            state, batch_stats, new = step(state, batch_stats, batch_of(i))
            return (
                state,
                batch_stats,
                jax.tree.map(lambda every, one: every.at[i].set(one), metrics, new),
            )

        one = jax.eval_shape(lambda: step(state, batch_stats, batch_of(0))[2])
        metrics = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), one)
        return jax.lax.fori_loop(0, count, body, (state, batch_stats, metrics))

    return loop


def unstack(metrics: Metrics, steps: int) -> list[Metrics]:
    """Returns the metrics of each step of one dispatch, on the host; waits for the device."""
    every = jax.device_get(metrics)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], every) for i in range(steps)]
