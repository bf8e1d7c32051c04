"""Reads a trained network from the folder of its run, and checks it against its folded form."""

import functools
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.clinic.folding import Folding, difference
from bnjax.clinic.linen import Linen, folded_model, folded_pairs, linen
from bnjax.data.batches import Examples, eval_batches
from bnjax.data.datasets import Dataset
from bnjax.data.feed import every_batch
from bnjax.errors import UserError
from bnjax.loss import softmax_cross_entropy
from bnjax.metrics import from_losses
from bnjax.text import progress
from bnjax.train import build
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.config import default_config
from bnjax.train.cpu import compiler_options
from bnjax.train.jsonl import write_json
from bnjax.train.rundir import FOLDED, check_is_free, read, read_folded
from bnjax.train_step import TrainState, forward, init_variables
from bnjax.types import Batch, BatchStats, Images, Labels, Logits, Params

TOLERANCE = 1e-5  # relative to the largest logit
PROBE = 256  # the number of images for comparing networks
BATCH = 64  # the number of images per batch


class Trained:
    """A trained network and the facts about its training.

    Attributes:
        workdir: the run's folder.
        config: the config of the run.
        data: the facts about the training data.
        step: the step of the checkpoint.
        weights: the fingerprint of the weights with which the statistics were computed; None if
            unknown.
        model: the linen module.
        params: the weights.
        batch_stats: the running statistics.
    """

    def __init__(self, workdir: Path, checkpoint: str):
        """Reads a run and one of its checkpoints: "best", "last" or a step number.

        Raises:
            UserError: if the folder holds no run or no such checkpoint.
        """
        self.workdir = workdir
        self.config, self.data = read(workdir)
        model = build.network(self.config.model, len(self.data.classes), self.data.image_shape)
        self.model = folded_model(model, read_folded(workdir))
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
        """Loads the training data of the network.

        Args:
            data_dir: the folder of the data; None means the same folder as in training.

        Raises:
            UserError: if the data are not found.
        """
        config = self.config.copy_and_resolve_references()
        config.data.dir = data_dir or config.data.dir
        # If training used a fallback data set, use the fallback again, even if the configured data
        # set is available now.
        if self.data.name != config.data.name:
            config.data = default_config().data
            config.data.name = self.data.name
        dataset = build.dataset(config)
        if dataset.label != self.data.label:
            raise UserError(
                f"the run was trained on {self.data.label}, but the data found now are "
                f"{dataset.label}. Give the folder of the training data with --data-dir."
            )
        return dataset

    @property
    def is_low(self) -> bool:
        """Whether some of the arithmetic uses bfloat16 on this machine."""
        model = self.config.model
        return "bfloat16" in (build.dtype_of(model), model.dense_product)

    @property
    def network(self) -> Linen:
        """The network in the form that the clinic's functions expect."""
        return linen(self.model, self.params, self.batch_stats)

    def write(
        self,
        out: Path,
        network: Linen,
        about: dict[str, Any],
    ) -> None:
        """Writes a network derived from this one into a folder for `bnjax predict --workdir`.

        Args:
            out: the folder to write.
            network: the new network.
            about: facts about the new network, as JSON values.

        Raises:
            UserError: if the folder is neither new nor empty.
        """
        check_is_free(out)
        step = jnp.asarray(self.step, jnp.int32)
        state = TrainState(step, network.params, (), jax.random.key(0))
        with Checkpoints(out / "checkpoints") as checkpoints:
            checkpoints.save(state, network.batch_stats, None, about)
        if pairs := [[".".join(path) for path in one] for one in folded_pairs(network.model)]:
            write_json(out / FOLDED, {"of": str(self.workdir), "pairs": pairs, **about})
        # Copied last, because this file marks the folder as complete.
        shutil.copyfile(self.workdir / "config.json", out / "config.json")


def probe(trained: Trained, data_dir: str | None) -> tuple[Images, str]:
    """Returns images for comparing networks, uint8 [n, h, w, c], and their description.

    Uses test images if the folder of the data is given, and otherwise noise with a random mean and
    contrast for each image.
    """
    if data_dir is not None:
        images = trained.dataset(data_dir).test.select(slice(PROBE)).image
        return images, f"{len(images)} test images"
    rng = np.random.default_rng(0)
    each = (PROBE, 1, 1, 1)
    noise = rng.uniform(-1, 1, (PROBE, *trained.data.image_shape)) * rng.uniform(0, 128, each)
    images = np.clip(rng.uniform(0, 255, each) + noise, 0, 255).astype(np.uint8)
    return images, f"{PROBE} images of noise"


def check_folded(trained: Trained, folding: Folding, data_dir: str | None) -> dict[str, Any]:
    """Returns the relative difference between the logits of the folded and the trained network.

    The entry "difference" is computed in float32. If the run uses bfloat16, the entry
    "difference_in_bfloat16" is computed in the run's arithmetic.

    Raises:
        UserError: if the difference in float32 exceeds `TOLERANCE`.
    """
    images, about = probe(trained, data_dir)
    found = []
    for model in [in_float32(trained), *([trained.model] if trained.is_low else [])]:
        after = folded_model(model, folding.pairs)
        own = logits(linen(model, trained.params, trained.batch_stats), images)
        variables = (folding.network.params, folding.network.batch_stats)
        found.append(difference(own, logits(linen(after, *variables), images)))
    if not found[0] <= TOLERANCE:
        raise UserError(
            f"on {about} the logits of the folded network differ from the original ones by "
            f"{found[0]:.1e} of the largest logit, more than {TOLERANCE}, so nothing was written. "
            "Possible causes are a mean that is large compared with its standard deviation, and "
            "statistics that were never updated: see bnjax audit."
        )
    low = {"difference_in_bfloat16": found[1]} if trained.is_low else {}
    return {"probe": about, "difference": found[0]} | low


def in_float32(trained: Trained) -> Any:
    """Returns the model of a run with all arithmetic in float32."""
    config = trained.config.model.copy_and_resolve_references()
    config.dtype = config.dense_product = "float32"
    model = build.network(config, len(trained.data.classes), trained.data.image_shape)
    return folded_model(model, folded_pairs(trained.model))


def logits(network: Linen, images: Images, batch_size: int = BATCH) -> np.ndarray:
    """Returns the logits computed in evaluation mode, [n, classes]."""
    size = min(batch_size, len(images))
    batches = eval_batches(np.asarray(images), np.zeros(len(images), np.int32), size)
    return _logits(network, batches, -(-len(images) // size))[0]


def logits_and_labels(
    network: Linen, split: Examples, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits computed in evaluation mode, [n, classes], and the labels of a split."""
    size = min(batch_size, len(split))
    return _logits(network, every_batch(split, size), -(-len(split) // size))


def loss_and_accuracy(logits: Logits, labels: Labels) -> dict[str, float]:
    """Returns the mean loss and the accuracy as `loss` and `accuracy`."""
    return from_losses(softmax_cross_entropy(logits, labels), logits, labels, None).means()


def _logits(network: Linen, batches: Iterable[Batch], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the logits and labels of all unmasked examples."""
    run = jax.jit(
        functools.partial(forward, model=network.model, train=False),
        compiler_options=compiler_options(),
    )
    found, labels = [], []
    for batch in progress(batches, "logits", "batch", count):
        real = batch.get("mask", slice(None))
        found.append(np.asarray(run(network.params, network.batch_stats, batch)[0])[real])
        labels.append(np.asarray(batch["label"])[real])
    return np.concatenate(found), np.concatenate(labels)
