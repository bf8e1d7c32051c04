"""What goes on inside a network: graph, histograms, predictions, and what went bad first."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bnjax.clinic.gap import Drift, drift, gap
from bnjax.clinic.layers import norm_layers, nothing_seen
from bnjax.clinic.precise import put
from bnjax.data.batches import spread
from bnjax.data.datasets import Dataset
from bnjax.train.build import Experiment
from bnjax.train.config import default_config
from bnjax.train.cpu import compiler_options, init_options
from bnjax.train.graph import graph_def, nodes
from bnjax.train.histograms import sample, summarise
from bnjax.train.parsing import flat
from bnjax.train.records import RunWriter
from bnjax.train.steps import Variables
from bnjax.train.tensorboard import contact_sheet
from bnjax.train_step import (
    LossFn,
    TrainState,
    dropout_key,
    forward,
    predict_step,
    softmax_cross_entropy,
)
from bnjax.types import Batch, BatchStats, Logits, Params, named_leaves


class Observer:
    """Shows what goes on in a network beside its metrics; training stays as it is."""

    def __init__(self, experiment: Experiment, dataset: Dataset):
        """Chooses the images, spread evenly over each split; compiles nothing yet."""
        self._classes = dataset.classes
        self._train = spread(dataset.train, experiment.histograms)
        self._test = spread(dataset.test, experiment.pictures)
        self._same = spread(dataset.train, experiment.gap_images)
        self._model = experiment.model
        self._shape = (experiment.batch_size, *dataset.train.image_shape)
        self._sample = jax.jit(
            functools.partial(sample, model=experiment.model), compiler_options=compiler_options()
        )
        # Compiled in a third of the time, and as fast: it runs seldom.
        self._gap = jax.jit(
            functools.partial(gap, model=experiment.model),
            compiler_options=compiler_options() | init_options(),
        )
        self._predict = jax.jit(
            functools.partial(predict_step, model=experiment.model),
            compiler_options=compiler_options(),
        )

    def introduce(self, writer: RunWriter, config: ConfigDict) -> None:
        """Shows the graph of the model and the hyperparameters."""
        writer.board.graph(graph_def(nodes(self._model, self._shape)))
        values, standard = flat(config.to_dict()), flat(default_config().to_dict())
        # TensorBoard shows the first few columns: what is special about this run.
        writer.board.hyperparameters(
            dict(sorted(values.items(), key=lambda item: item[1] == standard[item[0]]))
        )

    def observe(
        self,
        writer: RunWriter,
        step: int,
        state: TrainState,
        batch_stats: BatchStats,
        evaluated: Variables,
    ) -> None:
        """Records the gap, the histograms and the predictions after so many steps.

        The predictions are of what is evaluated; all else is of what training has.
        """
        if len(self._same.label) and nothing_seen(batch_stats):
            batch = {"image": self._same.image, "label": self._same.label}
            found = jax.device_get(self._gap(state.params, batch_stats, batch))
            layers = norm_layers(self._model, state.params, batch_stats, batch, train=False)
            drifts = drift(batch_stats, put(batch_stats, found.seen, layers), layers)
            means = found.batch.means().items()
            writer.gap(
                step,
                found.stored.means() | {f"batch_{key}": value for key, value in means},
                len(self._same.label),
                {
                    f"drift_{of}": {name: getattr(one, of) for name, one in drifts.items()}
                    for of in Drift._fields
                },
            )
        if len(self._train.label):
            batch = {"image": self._train.image, "label": self._train.label}
            writer.histograms(
                step, summarise(jax.device_get(self._sample(state, batch_stats, batch)))
            )
        if len(self._test.label):
            predicted = jax.device_get(self._predict(*evaluated, self._test.image))
            writer.pictures(step, self._sheet(predicted["class"], predicted["score"].max(-1)))

    def _sheet(self, predicted: np.ndarray, score: np.ndarray) -> np.ndarray:
        wrong = predicted != self._test.label
        captions = [
            f"{self._classes[guess]} {certain:.2f}"
            + (f"\nnot {self._classes[truth]}" if guess != truth else "")
            for guess, certain, truth in zip(predicted, score, self._test.label, strict=True)
        ]
        return contact_sheet(self._test.image, captions, wrong.tolist())


def first_nonfinite(
    state: TrainState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
) -> str | None:
    """Returns in words what in a training step is not finite first; None if all is finite.

    Looks at the images, the parameters, the statistics, the output of each layer, the new
    statistics, the losses and the gradients. The forward pass is not compiled, so that the layers
    are met in the order in which they run.

    Args:
        state: as it was before the step, `step` included, since dropout depends on it.
        batch_stats: likewise.
        batch: the batch of the step.
        model: as for `train_step`.
        loss_fn: as for `train_step`.
    """
    bind = functools.partial(forward, model=model, train=True, dropout=dropout_key(state))
    logits, written = bind(state.params, batch_stats, batch, capture=True)

    def losses_of(logits: Logits) -> jax.Array:
        return jnp.where(batch.get("mask", True), loss_fn(logits, batch["label"]), 0)

    def loss(params: Params) -> jax.Array:
        return losses_of(bind(params, batch_stats, batch)[0]).sum()

    images = batch["image"] if "mask" not in batch else batch["image"][np.asarray(batch["mask"])]
    stages = [
        ("the image values", images),
        ("the parameter", state.params),
        ("the running statistic", batch_stats),
        ("the output of layer", written["intermediates"]),
        ("the new statistic", written.get("batch_stats", {})),
        ("the losses", losses_of(logits)),
    ]
    for words, tree in stages:
        for name in _bad_leaves(tree):
            return f"{words} {name}".strip()
    for name in _bad_leaves(jax.jit(jax.grad(loss))(state.params)):
        return f"the gradient of {name}"
    return None


def _bad_leaves(tree: Any) -> list[str]:
    """Returns the names of the leaves that are not finite, in the tree's order."""
    leaves = named_leaves(tree).items()
    bad = [name for name, leaf in leaves if not np.isfinite(np.asarray(leaf, np.float32)).all()]
    return [name.partition("__call__")[0].rstrip(".") for name in bad]
