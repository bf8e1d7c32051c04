"""What an experiment computes, compiled once for all the runs that share it."""

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.arrays import Batch, BatchStats, Params
from bnjax.data.batches import eval_batches, spread
from bnjax.data.datasets import Dataset, Split
from bnjax.data.feed import Feed, host_feed, resident_feed
from bnjax.errors import UserError
from bnjax.metrics import Metrics
from bnjax.stats.layers import norm_layers, nothing_seen, observe
from bnjax.stats.precise import put
from bnjax.stats.weights import averaged_params
from bnjax.train.build import Experiment
from bnjax.train.xla import compiler_options, init_options, memory
from bnjax.train_step import TrainState, eval_step, init_state, train_step

MAX_STEPS = 100  # a dispatch
RESIDENT_SHARE = 0.25  # of a device's memory, that the training images may fill

State = tuple[TrainState, BatchStats]
Variables = tuple[Params, BatchStats]
Both = TypeVar("Both", State, Variables)


def default_feed(experiment: Experiment, split: Split) -> Feed:
    """Returns the feed that is fast on the default backend.

    A CPU takes one step a dispatch: many in one program are ten times slower there
    (jax-ml/jax#12868). An accelerator would wait for the host between steps: it gets many, and
    the images once for all.
    """
    batch_size, shuffle = experiment.batch_size, experiment.shuffle
    room = RESIDENT_SHARE * (memory() or float("inf"))
    if jax.default_backend() == "cpu" or split.image.nbytes > room:
        return host_feed(split, batch_size, shuffle=shuffle)
    return resident_feed(split, batch_size, shuffle=shuffle, max_steps=MAX_STEPS)


class Steps:
    """The compiled functions of an experiment, for one seed or several side by side.

    With several seeds, state and statistics are those of all of them; `join` and `split` go from
    and to those of each.

    Attributes:
        feed: where the batches come from.
        resident: what of the feed lies on the device.
        train: (state, batch_stats, streak, resident, *shipment) -> (state, batch_stats, streak,
            metrics), the states donated; the shipment is from `bnjax.data.feed.ship`, the metrics
            are for `unstack`. `streak` (of each seed) counts how many steps in a row were dropped
            because they were not finite. Once it is above the experiment's limit every further
            step is dropped, so that the state stays what the first of them met.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset, feed: Feed, seeds: int = 1):
        """Compiles nothing yet."""
        model, product = experiment.model, experiment.product
        self._experiment, self._dataset, self._seeds = experiment, dataset, seeds
        self.feed = feed
        self.resident = jax.device_put(feed.resident)
        self._init = jax.jit(
            functools.partial(init_state, model, experiment.tx), compiler_options=init_options()
        )
        self.train = jax.jit(
            training_program(experiment, feed, seeds),
            donate_argnums=(0, 1),
            compiler_options=compiler_options(experiment.batch_size, product),
        )
        test = functools.partial(eval_step, model=model)
        self._test = jax.jit(
            jax.vmap(test, in_axes=(0, 0, None)) if seeds > 1 else test,
            compiler_options=compiler_options(experiment.eval_batch_size, product),
        )
        watch = functools.partial(observe, model=model, mode="batch")
        self._observe = jax.jit(
            jax.vmap(watch, in_axes=(0, 0, 0, None)) if seeds > 1 else watch,
            compiler_options=compiler_options(experiment.batch_size, product),
        )

    def like(self) -> State:
        """Returns the shapes and dtypes of one seed.

        Raises:
            UserError: if they do not fit into the device's memory for all seeds. XLA would say so
                late, or wait for ever.
        """
        found = jax.eval_shape(self._init, jax.random.key(0), self._dataset.train.image[:1])
        leaves = jax.tree.leaves(found)
        needed = self._seeds * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        room = memory()
        if room is not None and needed > room:
            raise UserError(
                f"the parameters and the optimizer's state take {needed / 2**30:,.0f} GiB, and "
                f"{jax.devices()[0].device_kind} has {room / 2**30:,.0f}. Make the layers smaller: "
                "--config.model.filters, --config.model.dense."
            )
        return found

    def init(self, key: jax.Array) -> State:
        """Returns one untrained seed."""
        return self._init(key, self._dataset.train.image[:1])

    def join(self, states: list[State]) -> State:
        """Returns the states of each seed as one."""
        if self._seeds == 1:
            return states[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def streak(self, skipped: list[int]) -> np.ndarray:
        """Returns the first `streak`, from the steps in a row that each seed has dropped so far."""
        return np.array(skipped if self._seeds > 1 else skipped[0], np.int32)

    def split(self, both: Both) -> list[Both]:
        """Returns the state of each seed, or its variables."""
        if self._seeds == 1:
            return [both]
        return [jax.tree.map(operator.itemgetter(i), both) for i in range(self._seeds)]

    def evaluated(self, state: TrainState, batch_stats: BatchStats) -> Variables:
        """Returns the weights and statistics that are evaluated and predicted with.

        By default those that training has; otherwise averaged weights, or precise statistics.
        """
        experiment = self._experiment
        params = state.params
        if experiment.averages:
            params = averaged_params(state.opt_state, params)
        if not experiment.precise_images:
            return params, batch_stats
        batches = precise_batches(
            self._dataset.train, experiment.precise_images, experiment.batch_size
        )
        seen, batch = nothing_seen(batch_stats), None
        for batch in batches if seen else ():
            _, seen = self._observe(params, batch_stats, seen, batch)
        if batch is None:  # no norm has statistics
            return params, batch_stats
        one = (params, batch_stats)
        if self._seeds > 1:
            one = jax.tree.map(lambda leaf: leaf[0], one)
        layers = norm_layers(experiment.model, *one, batch=batch, train=False)
        return params, put(batch_stats, seen, layers)

    def test(self, params: Params, batch_stats: BatchStats) -> list[Metrics]:
        """Returns the metrics of each seed over all test images."""
        test = self._dataset.test
        batches = eval_batches(test.image, test.label, self._experiment.eval_batch_size)
        metrics = [self._test(params, batch_stats, batch) for batch in batches]
        total = functools.reduce(Metrics.merge, jax.device_get(metrics))
        (of_seeds,) = unstack(total, 1, self._seeds)
        return of_seeds


def precise_batches(split: Split, images: int, batch_size: int) -> Iterator[Batch]:
    """Yields images at equal distances, in batches of one size that is at most `batch_size`.

    They are as alike as can be: a small last one would be normalised by few images.
    """
    chosen = spread(split, images)
    size = -(-images // -(-images // batch_size))
    return eval_batches(chosen.image, chosen.label, size)


def training_program(experiment: Experiment, feed: Feed, seeds: int) -> Any:
    """Returns `Steps.train`, to be compiled."""
    model, tx, most_skipped = experiment.model, experiment.tx, experiment.most_skipped

    def one(state: Any, batch_stats: Any, streak: Any, resident: Any, item: Any) -> Any:
        batch = feed.batch(resident, item)
        new, new_stats, metrics = train_step(
            state, batch_stats, batch, model=model, tx=tx, skip_nonfinite=True
        )
        over = streak > most_skipped
        old = (dataclasses.replace(state, step=new.step), batch_stats)
        new, new_stats = jax.tree.map(
            lambda old, new: new if new is old else jnp.where(over, old, new), old, (new, new_stats)
        )
        streak = jnp.where(over | (metrics.skipped > 0), streak + 1, 0)
        return new, new_stats, streak, metrics

    step: Any = jax.vmap(one, in_axes=(0, 0, 0, None, 0)) if seeds > 1 else one
    if feed.max_steps == 1:
        return step

    # The number of steps is an argument of the program, so that it is compiled once, and a step's
    # bits do not depend on how many others it was dispatched with.
    def several(
        state: Any, batch_stats: Any, streak: Any, resident: Any, items: Any, n: Any
    ) -> Any:
        def item(i: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[i], items)

        def body(i: Any, carry: Any) -> Any:
            *states, every = carry
            *states, metrics = step(*states, resident, item(i))
            return *states, jax.tree.map(lambda all, one: all.at[i].set(one), every, metrics)

        one_step = jax.eval_shape(step, state, batch_stats, streak, resident, item(0))[-1]
        every = jax.tree.map(
            lambda leaf: jnp.zeros((feed.max_steps, *leaf.shape), leaf.dtype), one_step
        )
        return jax.lax.fori_loop(0, n, body, (state, batch_stats, streak, every))

    return several


def unstack(metrics: Metrics, steps: int, seeds: int) -> list[list[Metrics]]:
    """Returns the metrics of each step and, in it, each seed, on the host; waits for the device."""
    every = jax.tree.map(lambda leaf: leaf.reshape(-1, seeds), jax.device_get(metrics))
    return [
        [jax.tree.map(lambda leaf, at=(i, j): leaf[at], every) for j in range(seeds)]
        for i in range(steps)
    ]
