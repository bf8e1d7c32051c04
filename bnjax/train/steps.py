"""Compiles the functions of an experiment, which all its runs share."""

import functools
import operator
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.clinic.accumulation import accumulated_step
from bnjax.clinic.averaging import averaged_params
from bnjax.clinic.linen import Linen, linen
from bnjax.clinic.statistics import precise
from bnjax.compat import vmap
from bnjax.data.batches import Examples, eval_batches, evenly_spaced
from bnjax.data.datasets import Dataset
from bnjax.data.feed import Feed, Item, every_batch, ship
from bnjax.errors import UserError
from bnjax.metrics import Metrics
from bnjax.nonfinite import until_stopped
from bnjax.train.build import Experiment
from bnjax.train.cpu import compiler_options, init_options, memory
from bnjax.train.matmul_library import fastest_options
from bnjax.train.warm_start import Taken, read_source, take_over
from bnjax.train_step import AxisName, TrainState, dropout_key, eval_step, init_state, train_step
from bnjax.types import Batch, BatchStats, Params

AUGMENTATION = 1  # folded into a step's key for augmentation; dropout uses that key itself

State = tuple[TrainState, BatchStats]
Variables = tuple[Params, BatchStats]
Both = TypeVar("Both", State, Variables)


class Steps:
    """The compiled functions of an experiment, for one seed or for several seeds in parallel.

    With several seeds, all arrays in the state and the statistics have a leading axis.

    Attributes:
        experiment: the experiment to compute.
        feed: the source of training batches.
        compile_seconds: the time spent on compiling `train` so far, in seconds.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset, feed: Feed, seeds: int = 1):
        """Prepares the functions; the first call of each compiles it."""
        self.experiment, self._dataset, self._seeds = experiment, dataset, seeds
        self._parallel = parallel = experiment.parallel
        self.feed, self.compile_seconds = feed, 0.0
        self._resident = parallel.put(feed.resident, None)
        # In the result of `ship`, an axis of steps and one of seeds may precede the examples.
        examples = int(seeds > 1) + int(feed.max_steps > 1)
        self._shipped = (examples,) if feed.max_steps == 1 else (examples, None)
        self._init = jax.jit(
            functools.partial(init_state, experiment.model, experiment.tx),
            compiler_options=init_options(),
        )
        self._train = parallel.compile(
            functools.partial(training_program, experiment, feed, seeds),
            (None, None, None, None, *self._shipped),
            donate_argnums=(0, 1),
        )
        self._program: Any = None
        # Batches are padded, so that all devices process equally many images.
        devices = parallel.mesh.size
        self._test_size = -(-experiment.eval_batch_size // devices) * devices

        def test(axis_name: Any) -> Any:
            step = functools.partial(eval_step, model=experiment.tested_model, axis_name=axis_name)
            return over_seeds(step, (0, 0, None), seeds)

        def watch(axis_name: Any) -> Any:
            step = functools.partial(Linen.observe, mode="batch", axis_name=axis_name)
            return lambda *arguments: (None, step(*arguments)[1])

        self._test = parallel.compile(test, (None, None, 0), compiler_options=compiler_options())
        self._observe = parallel.compile(
            watch,
            (None, None, 0),
            compiler_options=compiler_options(),
        )

    def like(self) -> State:
        """Returns the shapes and dtypes of the state and the statistics of one seed.

        Raises:
            UserError: if the arrays of all seeds exceed the device's memory. XLA would report this
                late, or hang.
        """
        found = jax.eval_shape(self._init, jax.random.key(0), self._first_images())
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

    def init(self, seed: int) -> State:
        """Returns the state and the statistics of an untrained network."""
        return self._init(key_of(seed), self._first_images())

    def begin(self, seed: int) -> tuple[State, Taken | None]:
        """Returns the initial state of a seed, and the leaves copied from another network."""
        state, batch_stats = self.init(seed)
        if self.experiment.source is None:
            return (state, batch_stats), None
        source = read_source(self.experiment.source)
        state, batch_stats, taken = take_over(state, batch_stats, source, self.experiment.tx)
        return (state, batch_stats), taken

    def _first_images(self) -> np.ndarray:
        """Returns the images for initialising the network; most networks use only their shape."""
        return self._dataset.train.select(np.arange(self.experiment.init_images)).image

    def join(self, states: list[State], bad_steps: list[int]) -> tuple[Any, Any, Any]:
        """Puts the states, statistics and counts of bad steps of all seeds on all devices."""
        bad = self._stack([np.int32(count) for count in bad_steps])
        return self._parallel.put((*self._stack(states), bad), None)

    def _stack(self, trees: list[Any]) -> Any:
        if self._seeds == 1:
            return trees[0]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def train(
        self, state: Any, batch_stats: Any, bad_steps: Any, dispatch: Sequence[Sequence[Item]]
    ) -> tuple[Any, Any, Any, Metrics]:
        """Takes several steps; the first call compiles the program.

        The state and the statistics are donated. `unstack` splits the returned metrics.

        Args:
            state, batch_stats: the state and the statistics of all seeds.
            bad_steps: the number of consecutive non-finite steps up to the latest, int [seeds]. If
                the number is above the experiment's limit, every step is dropped, so that the state
                (except `state.step`) and the statistics are those before the first bad step.
            dispatch: for each step, the item of each seed.
        """
        shipment = map(self._parallel.put, ship(self.feed, dispatch), self._shipped)
        arguments = (state, batch_stats, bad_steps, self._resident, *shipment)
        if self._program is None:
            began = time.perf_counter()
            traced, times_products = self._train.trace(*arguments), self.experiment.times_products
            options = fastest_options(traced.jaxpr) if times_products else compiler_options()
            self._program = traced.lower().compile(compiler_options=options)
            self.compile_seconds += time.perf_counter() - began
        return self._program(*arguments)

    def of_seed(self, tree: Both, i: int) -> Both:
        """Returns the state or the variables of one seed."""
        return tree if self._seeds == 1 else jax.tree.map(operator.itemgetter(i), tree)

    def local(self, tree: Both, i: int) -> Both:
        """Returns the state or the variables of one seed, on one device of this process."""
        return self._parallel.local(self.of_seed(tree, i))

    def evaluated(self, state: TrainState, batch_stats: BatchStats) -> Variables:
        """Returns the weights and statistics for evaluation and prediction.

        By default, these are the weights and statistics used in training; the config can choose
        averaged weights or precise statistics instead.
        """
        experiment = self.experiment
        params = state.params
        if experiment.averages:
            params = averaged_params(state.opt_state, params)
        if not experiment.precise_images or not batch_stats:
            return params, batch_stats
        images, batch_size = experiment.precise_images, experiment.batch_size
        batches = [
            self._parallel.put(self._parallel.part.of(batch), 0)
            for batch in precise_batches(self._dataset.train, images, batch_size)
        ]
        networks = [
            linen(experiment.model, *self.of_seed((params, batch_stats), i))
            for i in range(self._seeds)
        ]
        # `_observe` is compiled for several devices, once for all evaluations.
        found = [precise(one, batches, jit=lambda _: self._observe) for one in networks]
        return params, self._stack([one.batch_stats for one in found])

    def test(
        self, params: Params, batch_stats: BatchStats, split: Examples | None = None
    ) -> list[Metrics]:
        """Returns the metrics of each seed over all images in a split (None: the test images)."""
        split = self._dataset.test if split is None else split
        batches = every_batch(split, self._test_size, self._parallel.part)
        metrics = [self._test(params, batch_stats, self._parallel.put(one, 0)) for one in batches]
        total = functools.reduce(Metrics.merge, jax.device_get(metrics))
        (of_seeds,) = unstack(total, 1, self._seeds)
        return of_seeds


def key_of(seed: int) -> jax.Array:
    """Returns the key to pass to `init_state`. No other function converts a seed to a key."""
    return jax.random.split(jax.random.key(seed))[0]


def precise_batches(split: Examples, images: int, batch_size: int) -> Iterator[Batch]:
    """Yields evenly spaced images in batches of nearly equal size, at most `batch_size`.

    The sizes are nearly equal because a small last batch would have inaccurate batch statistics.
    """
    chosen = evenly_spaced(split, images)
    size = -(-images // -(-images // batch_size))
    return eval_batches(chosen.image, chosen.label, size)


def training_program(
    experiment: Experiment, feed: Feed, seeds: int, axis_name: tuple[str, ...] | None = None
) -> Any:
    """Returns the function that `Steps.train` compiles.

    With `axis_name`, the function computes one device's part of the batch.
    """
    take_step: Any = train_step
    if (parts := experiment.micro_batches) > 1:
        take_step = functools.partial(accumulated_step, micro_batches=parts)

    def one(state: Any, batch_stats: Any, bad_steps: Any, resident: Any, item: Any) -> Any:
        def loss_fn(logits: Any, label: Any) -> Any:
            losses = experiment.loss_fn(logits, label)
            return until_stopped(losses, bad_steps, experiment.most_skipped)

        state, batch_stats, metrics = take_step(
            state,
            batch_stats,
            training_batch(experiment, state, feed.batch(resident, item), axis_name),
            model=experiment.training_model,
            tx=experiment.tx,
            loss_fn=loss_fn,
            axis_name=axis_name,
            skip_nonfinite=True,
        )
        return state, batch_stats, (bad_steps + 1) * metrics.skipped, metrics

    step = over_seeds(one, (0, 0, 0, None, 0), seeds)
    if feed.max_steps == 1:
        return step

    # The number of steps is an argument of the program, so that the program is compiled only once
    # and the bits of a step do not depend on the number of steps in its dispatch.
    def several(
        state: Any, batch_stats: Any, bad_steps: Any, resident: Any, items: Any, n: Any
    ) -> Any:
        def item(i: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[i], items)

        def body(i: Any, carry: Any) -> Any:
            *states, every = carry
            *states, metrics = step(*states, resident, item(i))
            return *states, jax.tree.map(lambda all, one: all.at[i].set(one), every, metrics)

        one_step = jax.eval_shape(step, state, batch_stats, bad_steps, resident, item(0))[-1]
        every = jax.tree.map(
            lambda leaf: jnp.zeros((feed.max_steps, *leaf.shape), leaf.dtype), one_step
        )
        return jax.lax.fori_loop(0, n, body, (state, batch_stats, bad_steps, every))

    return several


def over_seeds(step: Any, in_axes: tuple[int | None, ...], seeds: int) -> Any:
    """Maps a step for one seed over several seeds."""
    return vmap(step, in_axes) if seeds > 1 else step


def training_batch(
    experiment: Experiment, state: TrainState, batch: Batch, axis_name: AxisName = None
) -> Batch:
    """Returns an augmented batch with only the entries that `train_step` uses.

    Args:
        experiment: determines the augmentation.
        state: the state before the step.
        batch: a batch from the feed.
        axis_name: as for `train_step`.
    """
    if experiment.augment is not None:
        key = jax.random.fold_in(dropout_key(state, axis_name), AUGMENTATION)
        batch = experiment.augment(key, {**batch, "run": state.rng})
    return {name: batch[name] for name in ("image", "label", "mask") if name in batch}


def unstack(metrics: Metrics, steps: int, seeds: int) -> list[list[Metrics]]:
    """Waits for the device, and returns the metrics of each step and seed as host values."""
    every = jax.tree.map(lambda leaf: leaf.reshape(-1, seeds), jax.device_get(metrics))
    return [
        [jax.tree.map(lambda leaf, at=(i, j): leaf[at], every) for j in range(seeds)]
        for i in range(steps)
    ]
