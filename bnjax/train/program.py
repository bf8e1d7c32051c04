"""What an experiment computes, compiled once for all the runs that share it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.arrays import BatchStats
from bnjax.data.batches import eval_batches
from bnjax.data.datasets import Dataset
from bnjax.errors import UserError
from bnjax.metrics import Metrics
from bnjax.train import dispatch
from bnjax.train.build import Experiment
from bnjax.train.evaluate import evaluate
from bnjax.train.watch import Watch
from bnjax.train.xla import compiler_options, init_options, memory
from bnjax.train_step import TrainState, eval_step, init_state, train_step


class Program:
    """The compiled functions of an experiment, for one run or for several that differ in their seed.

    With several `members` every leaf of a state, of the running statistics and of the metrics has a leading axis, one entry for each,
    and so have the rows of a batch: the members are trained side by side in one program.

    Attributes:
        experiment: what is trained.
        dataset: on what.
        members: how many runs at once.
        dispatch: takes training steps.
        watch: looks at a network beside its metrics.
    """

    def __init__(self, experiment: Experiment, dataset: Dataset, members: int = 1):
        """Compiles nothing yet."""
        model, options = (
            experiment.model,
            compiler_options(experiment.batch_size, experiment.product),
        )
        # A step that is not finite is always dropped; what differs is how many the loop puts up with.
        step = functools.partial(train_step, model=model, tx=experiment.tx, skip_nonfinite=True)
        test = functools.partial(eval_step, model=model)
        if members > 1:
            step, test = jax.vmap(step), jax.vmap(test, in_axes=(0, 0, None))
        self.experiment, self.dataset, self.members = experiment, dataset, members
        self.dispatch = dispatch.build(step, dataset.train, options)
        self.watch = Watch(experiment, dataset)
        self._init = jax.jit(
            functools.partial(init_state, model, experiment.tx), compiler_options=init_options()
        )
        self._test = jax.jit(
            test, compiler_options=compiler_options(experiment.eval_batch_size, experiment.product)
        )

    def like(self) -> tuple[TrainState, BatchStats]:
        """Returns the shapes and dtypes of one member.

        Raises:
            UserError: if the members cannot fit into the device's memory. XLA would say so late, or wait for ever.
        """
        found = jax.eval_shape(self._init, jax.random.key(0), self.dataset.train.image[:1])
        needed, room = (
            self.members * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(found)),
            memory(),
        )
        if room is not None and needed > room:
            raise UserError(
                f"the parameters and the optimizer's state take {needed / 2**30:,.0f} GiB, and {jax.devices()[0].device_kind} has "
                f"{room / 2**30:,.0f}. Make the layers smaller: --config.model.filters, --config.model.dense."
            )
        return found

    def init(self, key: jax.Array) -> tuple[TrainState, BatchStats]:
        """Returns one untrained member."""
        return self._init(key, self.dataset.train.image[:1])

    def join(self, members: list[Any]) -> Any:
        """Returns trees of one member each as one tree."""
        return (
            jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
            if self.members > 1
            else members[0]
        )

    def member(self, tree: Any, i: int) -> Any:
        """Returns one member's part of a tree."""
        return jax.tree.map(lambda leaf: leaf[i], tree) if self.members > 1 else tree

    def evaluate(self, state: TrainState, batch_stats: BatchStats) -> Metrics:
        """Returns the metrics over all test images."""
        test = self.dataset.test
        batches = eval_batches(test.image, test.label, self.experiment.eval_batch_size)
        return evaluate(self._test, state.params, batch_stats, batches)
