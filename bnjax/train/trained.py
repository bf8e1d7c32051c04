"""A trained network, from the folder of its run."""

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnjax.clinic.folded import Folded
from bnjax.data.datasets import Dataset
from bnjax.errors import UserError
from bnjax.train import build, network, rundir
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.config import default_config
from bnjax.train.records import write_json
from bnjax.train_step import TrainState, init_variables
from bnjax.types import BatchStats, Params


class Trained:
    """A trained network and what it was trained on.

    Attributes:
        workdir: the run's folder.
        config: of the run.
        data: the facts of its data.
        step: of the checkpoint.
        weights: the fingerprint of the weights that its statistics belong to; None if it was saved
            before there were any.
        folded: the paths of the norms that were folded and of the layers that have them.
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
        self.folded = rundir.folded_pairs(workdir)
        if self.folded:
            self.model = Folded(self.model, self.folded)
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

    def write(
        self,
        out: Path,
        params: Params,
        batch_stats: BatchStats,
        about: dict[str, Any],
        folded: Sequence[tuple[Sequence[str], Sequence[str]]],
    ) -> None:
        """Writes a network made of this one as a folder that `bnjax predict --workdir` takes.

        Args:
            out: the folder.
            params: the weights of the new network.
            batch_stats: its running statistics.
            about: anything worth knowing about it that is JSON.
            folded: as `self.folded`, of the new network.

        Raises:
            UserError: if the folder is neither new nor empty.
        """
        rundir.check_is_free(out)
        state = TrainState(jnp.asarray(self.step, jnp.int32), params, (), jax.random.key(0))
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(state, batch_stats, None, about)
        if folded:
            pairs = [[".".join(path) for path in pair] for pair in folded]
            write_json(out / rundir.FOLDED, {"of": str(self.workdir), "pairs": pairs, **about})
        # Last, since it makes the folder that of a network.
        shutil.copyfile(self.workdir / "config.json", out / "config.json")
