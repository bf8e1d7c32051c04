"""What goes on inside a network: its running statistics, activations and gradients, summed up."""

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bnjax.train_step import LossFn, TrainState, dropout_key, forward, softmax_cross_entropy
from bnjax.types import Array, Batch, BatchStats, Params, named_leaves

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
