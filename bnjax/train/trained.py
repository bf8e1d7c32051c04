"""A trained network, from the folder of its run."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from bnjax.arrays import BatchStats, Params
from bnjax.data.datasets import Dataset
from bnjax.errors import UserError
from bnjax.stats.folded import Folded
from bnjax.train import build, network, rundir
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.config import default_config
from bnjax.train_step import init_variables


class Trained:
    """A trained network and what it was trained on.

    Attributes:
        workdir: the run's folder.
        config: of the run.
        data: the facts of its data.
        step: of the checkpoint.
        weights: the fingerprint of the weights that its statistics belong to; None if it was saved
            before there were any.
        model: the network.
        params: its weights.
        batch_stats: its running statistics.
    """

    def __init__(self, workdir: Path, checkpoint: str):
        """Reads a run and one of its checkpoints, "best", "last" or a step.

        Raises:
            UserError: if the folder has no run or no such checkpoint.
        """
        self.workdir = workdir
        self.config, self.data = rundir.read(workdir)
        self.model: nn.Module = network.model(
            self.config.model, len(self.data.classes), self.data.image_shape
        )
        if pairs := rundir.folded_pairs(workdir):
            self.model = Folded(self.model, pairs)
        with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
            self.step = checkpoints.step(checkpoint)
            self.weights: str | None = checkpoints.about(self.step).get("weights")
            like = jax.eval_shape(
                functools.partial(init_variables, self.model, jax.random.key(0)),
                np.zeros((1, *self.data.image_shape), np.uint8),
            )
            self.params: Params
            self.batch_stats: BatchStats
            self.params, self.batch_stats = checkpoints.restore_variables(self.step, like)

    def dataset(self, data_dir: str | None) -> Dataset:
        """Returns the data that the network was trained on.

        Args:
            data_dir: where they lie, if not where they lay in training.

        Raises:
            UserError: if they are not found.
        """
        config = self.config.copy_and_resolve_references()
        config.data.dir = data_dir or config.data.dir
        # After a fallback that is another set than was asked for, and the one that was asked for
        # may have turned up since.
        if self.data.name != config.data.name:
            config.data = default_config().data
            config.data.name = self.data.name
        dataset = build.dataset(config)
        if dataset.label != self.data.label:
            raise UserError(
                f"the run was trained on {self.data.label}, and what is found now is "
                f"{dataset.label}. Say where its data lie with --data-dir."
            )
        return dataset
