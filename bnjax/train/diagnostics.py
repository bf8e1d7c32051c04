"""Looks into training: histograms, the gap between statistics, example predictions, bad values."""

import functools
import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bnjax.clinic.linen import linen
from bnjax.clinic.network import norm_paths
from bnjax.clinic.statistics import gap
from bnjax.clinic.watching import examine
from bnjax.data.batches import evenly_spaced
from bnjax.data.datasets import Dataset
from bnjax.loss import LossFn, softmax_cross_entropy
from bnjax.train.build import Experiment
from bnjax.train.config import default_config
from bnjax.train.cpu import compiler_options, init_options
from bnjax.train.graph import graph_def
from bnjax.train.jsonl import RunWriter
from bnjax.train.parsing import flat
from bnjax.train.steps import Variables
from bnjax.train.tensorboard import contact_sheet
from bnjax.train_step import TrainState, dropout_key, forward, predict_step
from bnjax.types import Array, Batch, BatchStats, Logits, Params, Tree, named_leaves

QUANTILES = (0.0, 0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995, 1.0)
BINS = 30
MAX_VALUES = 1 << 16  # per array; more values would not visibly change a histogram

# Arrays keyed by kind ("statistic", "activation", "gradient") and name, in the order of
# computation. OrderedDict keeps that order, whereas JAX sorts the keys of a plain dict.
Samples = OrderedDict[str, OrderedDict[str, Array]]


def sample(
    state: TrainState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
) -> Samples:
    """Returns the values of every running statistic, layer output and gradient in a training step.

    The outputs are those of the innermost modules except dropout layers; the gradients are those of
    the mean loss. Arrays with more than 65,536 values are subsampled at regular intervals. Nothing
    is updated, so a call does not affect training.

    Args:
        state: the state before the step.
        batch_stats: the statistics before the step.
        batch: `image` [n, h, w, c] and `label` int [n].
        model, loss_fn: as for `bnjax.train_step.train_step`.
    """

    def loss(params: Params) -> tuple[jax.Array, OrderedDict[str, Array]]:
        logits, written = forward(
            params,
            batch_stats,
            batch,
            model=model,
            train=True,
            dropout=dropout_key(state),
            capture=lambda module, method: (
                method == "__call__" and not isinstance(module, nn.Dropout)
            ),
        )
        return loss_fn(logits, batch["label"]).mean(), _outputs(written["intermediates"])

    grads, outputs = jax.grad(loss, has_aux=True)(state.params)
    place = {name: i for i, name in enumerate(outputs)}

    def in_order(tree: Tree) -> OrderedDict[str, Array]:
        """Returns the leaves in the order of their layers; other leaves come last."""
        leaves = named_leaves(tree).items()
        return OrderedDict(
            sorted(leaves, key=lambda item: place.get(item[0].rpartition(".")[0], len(place)))
        )

    kinds = OrderedDict(
        statistic=in_order(batch_stats), activation=outputs, gradient=in_order(grads)
    )
    return jax.tree.map(_thin, kinds)


def summarise(samples: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Any]]:
    """Returns the `quantiles` and a histogram of each sample as JSON values.

    Uses only the finite values, and omits samples without finite values. The quantiles are computed
    at the levels in `QUANTILES`. The histogram has `counts` in equal bins from `low` to `high`, the
    quantiles at 0.005 and 0.995; values beyond this range are counted in the outer bins.

    >>> numbers = summarise({"statistic": {"norm": np.arange(5.0)}})["statistic"]["norm"]
    >>> numbers["quantiles"][4], sum(numbers["counts"])
    (2.0, 5)
    """
    found: dict[str, dict[str, Any]] = {kind: {} for kind in samples}
    for kind, group in samples.items():
        for name, sampled in group.items():
            values = np.asarray(sampled, np.float64)
            values = values[np.isfinite(values)]
            if not values.size:
                continue
            quantiles = [float(f"{value:.6g}") for value in np.quantile(values, QUANTILES)]
            low, high = quantiles[1], quantiles[-2]
            if low == high:  # put this value in the centre of the range
                low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
            counts, _ = np.histogram(np.clip(values, low, high), BINS, (low, high))
            found[kind][name] = {
                "low": low,
                "high": high,
                "quantiles": quantiles,
                "counts": counts.tolist(),
            }
    return found


def _thin(values: Array) -> Array:
    """Returns at most `MAX_VALUES` evenly spaced values, float32 [count]."""
    stride = -(-values.size // MAX_VALUES) or 1
    while math.gcd(stride, values.size) > 1:  # with a common factor, channels might be skipped
        stride += 1
    return jnp.asarray(values, jnp.float32).reshape(-1)[::stride]


def _outputs(intermediates: Tree) -> OrderedDict[str, Array]:
    """Returns the outputs of the innermost modules, in the order of their calls."""
    found: dict[str, list[Array]] = {}
    for name, leaf in named_leaves(intermediates).items():
        found.setdefault(_layer(name), []).append(leaf.reshape(-1))
    return OrderedDict(
        (layer or "output", jnp.concatenate(parts))
        for layer, parts in found.items()
        if not any(
            other.startswith(f"{layer}." if layer else "") for other in found.keys() - {layer}
        )
    )


def _layer(name: str) -> str:
    """Extracts the name of a layer from the name of its output, such as "conv0.__call__.0"."""
    return name.partition("__call__")[0].rstrip(".")


def first_nonfinite(
    state: TrainState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
) -> str | None:
    """Describes the first non-finite value in a training step; None if all values are finite.

    Checks the images, the parameters, the statistics, the output of each layer, the new statistics,
    the losses and the gradients. The forward pass is not compiled, so that the layers are checked
    in the order of computation.

    Args:
        state: the state before the step; its `step` must be correct, because dropout depends on the
            step.
        batch_stats: the statistics before the step.
        batch: the batch of the step.
        model, loss_fn: as for `train_step`.
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
    """Returns the names of the non-finite leaves, in the order of the tree."""
    leaves = named_leaves(tree).items()
    bad = [name for name, leaf in leaves if not np.isfinite(np.asarray(leaf, np.float32)).all()]
    return [*map(_layer, bad)]


class Observer:
    """Records diagnostics of a network in addition to its metrics; does not affect training."""

    def __init__(self, experiment: Experiment, dataset: Dataset, options: ConfigDict):
        """Selects images evenly spaced over each split; functions are compiled at their first use.

        `options` is the section `eval` of the config.
        """
        self._classes = dataset.classes
        self._train = evenly_spaced(dataset.train, options.histograms)
        self._test = evenly_spaced(dataset.chosen_by[1], options.pictures)
        self._same = evenly_spaced(dataset.train, options.gap_images)
        self._model = experiment.model
        self._shape = (experiment.batch_size, *dataset.train.image_shape)
        jit = functools.partial(jax.jit, compiler_options=compiler_options())
        self._sample = jit(
            functools.partial(sample, model=experiment.model, loss_fn=experiment.loss_fn)
        )
        self._predict = jit(functools.partial(predict_step, model=experiment.model))
        # With these options the program compiles in a third of the time and runs equally fast.
        self._gap = jax.jit(gap, compiler_options=compiler_options() | init_options())

    def introduce(self, writer: RunWriter, config: ConfigDict) -> None:
        """Writes the graph of the model and the hyperparameters."""
        writer.board.graph(graph_def(self._model, self._shape))
        values, standard = flat(config.to_dict()), flat(default_config().to_dict())
        # TensorBoard shows the first few columns, so changed keys come first.
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
        """Records the gap, the histograms and the predictions after `step` steps.

        The predictions use `evaluated`; everything else uses `state` and `batch_stats`.
        """
        if len(self._same.label) and norm_paths(batch_stats):
            batch = {"image": self._same.image, "label": self._same.label}
            network = linen(self._model, state.params, batch_stats)
            found, drifts = examine(network, batch, self._gap)
            writer.gap(step, found, drifts)
        if len(self._train.label):
            batch = {"image": self._train.image, "label": self._train.label}
            samples = jax.device_get(self._sample(state, batch_stats, batch))
            writer.histograms(step, samples, summarise(samples))
        if len(self._test.label):
            predicted = jax.device_get(self._predict(*evaluated, self._test.image))
            scores, labels = predicted["score"].max(-1), self._test.label
            captions = [
                f"{self._classes[guess]} {score:.2f}"
                + (f"\nnot {self._classes[label]}" if guess != label else "")
                for guess, score, label in zip(predicted["class"], scores, labels, strict=True)
            ]
            sheet = contact_sheet(self._test.image, captions)
            writer.board.picture("test/predictions", sheet, step)
