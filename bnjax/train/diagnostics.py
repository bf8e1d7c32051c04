"""What goes on inside a network in training: histograms, gap, pictures, the first bad layer."""

import functools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bnjax.clinic.linen import Network, nothing_seen
from bnjax.clinic.statistics import Drift, drift, gap, put
from bnjax.data.batches import evenly_spaced
from bnjax.data.datasets import Dataset
from bnjax.train.build import Experiment
from bnjax.train.config import default_config
from bnjax.train.cpu import compiler_options, init_options
from bnjax.train.graph import graph_def
from bnjax.train.parsing import flat
from bnjax.train.rundir import RunWriter
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
from bnjax.types import Array, Batch, BatchStats, Logits, Params, named_leaves

QUANTILES = (0.0, 0.005, 0.05, 0.25, 0.5, 0.75, 0.95, 0.995, 1.0)
BINS = 30
MAX_VALUES = 1 << 16  # values that are looked at of one array; more would change no picture

# By kind ("statistic", "activation", "gradient") and name, in the order of the computation. JAX
# sorts the keys of other dicts.
Samples = OrderedDict[str, OrderedDict[str, Array]]


def sample(
    state: TrainState,
    batch_stats: BatchStats,
    batch: Batch,
    *,
    model: nn.Module,
    loss_fn: LossFn = softmax_cross_entropy,
) -> Samples:
    """Returns values of every running statistic, layer output and gradient of a training step.

    The outputs are those of the innermost modules (dropout left out), the gradients those of the
    mean loss. Of an array with more than 65,536 values, as many are taken at equal distances.
    Nothing is updated: whether and when this is called changes no training.

    Args:
        state: as before the step.
        batch_stats: likewise.
        batch: `image` [n, h, w, c], `label` int [n], optionally `mask` bool [n].
        model: any linen module, as for `bnjax.train_step.train_step`.
        loss_fn: likewise.
    """
    real = batch.get("mask", jnp.ones(len(batch["label"]), bool))

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
        outputs = OrderedDict[str, Array](_outputs(written["intermediates"]))
        return jnp.where(real, loss_fn(logits, batch["label"]), 0).sum() / jnp.maximum(
            real.sum(), 1
        ), outputs

    grads, outputs = jax.grad(loss, has_aux=True)(state.params)
    kinds = OrderedDict(
        statistic=_in_order(named_leaves(batch_stats), outputs),
        activation=outputs,
        gradient=_in_order(named_leaves(grads), outputs),
    )
    return jax.tree.map(_thin, kinds)


def summarise(samples: Mapping[str, Mapping[str, Array]]) -> dict[str, dict[str, Any]]:
    """Returns each of the samples as plain numbers, fit for JSON.

    What has no finite value is left out.

    `count`, `mean` and `std` of the finite values, their `quantiles` at `QUANTILES`, and a
    histogram: `counts` in equal bins from `low` to `high`, which are the quantiles 0.005 and 0.995;
    what lies outside is counted in the first and the last bin.

    >>> numbers = summarise({"statistic": {"norm": np.arange(5.0)}})["statistic"]["norm"]
    >>> numbers["count"], numbers["mean"], numbers["quantiles"][4], sum(numbers["counts"])
    (5, 2.0, 2.0, 5)
    """
    summed = {
        kind: {name: _summary(np.asarray(values, np.float64)) for name, values in group.items()}
        for kind, group in samples.items()
    }
    return {
        kind: {name: numbers for name, numbers in group.items() if numbers}
        for kind, group in summed.items()
    }


def _summary(values: np.ndarray) -> dict[str, Any]:
    values = values[np.isfinite(values)]
    if not values.size:
        return {}
    quantiles = np.quantile(values, QUANTILES)
    low, high = _short(quantiles[1]), _short(quantiles[-2])
    if not low < high:  # one value only: it stands in the middle
        low, high = low - max(0.5, abs(low) / 2), high + max(0.5, abs(high) / 2)
    counts, _ = np.histogram(np.clip(values, low, high), BINS, (low, high))
    return {
        "count": values.size,
        "mean": _short(values.mean()),
        "std": _short(values.std()),
        "low": low,
        "high": high,
        "quantiles": [_short(value) for value in quantiles],
        "counts": counts.tolist(),
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _thin(values: Array) -> Array:
    """Returns at most `MAX_VALUES` of the values, at equal distances, [count]."""
    size = max(values.size, 1)
    stride = -(-size // MAX_VALUES)
    while math.gcd(stride, size) > 1:  # it would meet some channels only
        stride += 1
    return jnp.asarray(values, jnp.float32).reshape(-1)[::stride]


def _outputs(
    tree: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, jax.Array]]:
    """Yields the names and outputs of the innermost modules, in the order of their calls."""
    inner = {name: branch for name, branch in tree.items() if isinstance(branch, Mapping)}
    for name, branch in inner.items():
        yield from _outputs(branch, (*path, name))
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree.get("__call__"))
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if leaves and not inner:
        yield ".".join(path) or "output", jnp.concatenate([leaf.reshape(-1) for leaf in leaves])


def _in_order(leaves: dict[str, Array], outputs: Mapping[str, Any]) -> OrderedDict[str, Array]:
    """Returns the leaves in the order of the layers that they belong to.

    Those of no layer come last.
    """
    place = {name: i for i, name in enumerate(outputs)}
    return OrderedDict(
        sorted(leaves.items(), key=lambda item: place.get(item[0].rpartition(".")[0], len(place)))
    )


class Observer:
    """Shows what goes on in a network beside its metrics; training stays as it is."""

    def __init__(self, experiment: Experiment, dataset: Dataset):
        """Chooses the images, spread evenly over each split; compiles nothing yet."""
        self._classes = dataset.classes
        self._train = evenly_spaced(dataset.train, experiment.histograms)
        self._test = evenly_spaced(dataset.test, experiment.pictures)
        self._same = evenly_spaced(dataset.train, experiment.gap_images)
        self._model = experiment.model
        self._shape = (experiment.batch_size, *dataset.train.image_shape)
        self._sample = jax.jit(
            functools.partial(sample, model=experiment.model), compiler_options=compiler_options()
        )
        # Compiled in a third of the time, and as fast: it runs seldom.
        self._gap = jax.jit(gap, compiler_options=compiler_options() | init_options())
        self._predict = jax.jit(
            functools.partial(predict_step, model=experiment.model),
            compiler_options=compiler_options(),
        )

    def introduce(self, writer: RunWriter, config: ConfigDict) -> None:
        """Shows the graph of the model and the hyperparameters."""
        writer.board.graph(graph_def(self._model, self._shape))
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
            network = Network(state.params, batch_stats, self._model)
            found, layers = jax.device_get(self._gap(network, batch)), network.norms(batch)
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
