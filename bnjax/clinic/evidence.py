"""What an audit measures: each norm's inputs batch by batch, and the network's predictions."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.layers import Mode, NormLayer, norm_layers, nothing_seen, observe
from bnjax.clinic.limits import limit
from bnjax.clinic.precise import put
from bnjax.norms.moments import Moments, merge
from bnjax.train_step import forward, softmax_cross_entropy
from bnjax.types import Batch, BatchStats, Params

# (batches, what for) -> the same, for a progress bar.
Watch = Callable[[Sequence[Batch], str], Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class Given:
    """What one norm was given in each of k whole batches; the c channels are one axis, float64.

    Attributes:
        mean, var: [k, c].
        count: values for each channel in the first batch.
    """

    mean: np.ndarray
    var: np.ndarray
    count: int


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What was measured of one norm.

    Attributes:
        layer: the norm, as evaluation calls it.
        mean, var: as stored, [c] float64.
        dtype: that the statistics are stored in.
        scale: learnt, [c]; ones if there is none.
        train: its inputs as in training, with dropped units.
        batch: its inputs where every norm normalises by the batch and no unit is dropped.
        random: whether its inputs in training depend on the dropout key.
        calls: how often a pass calls it.
        examples: of a batch that was looked at.
        shape: of its statistics.
    """

    layer: NormLayer
    mean: np.ndarray
    var: np.ndarray
    dtype: Any
    scale: np.ndarray
    train: Given
    batch: Given
    random: bool
    calls: int
    examples: int
    shape: tuple[int, ...]

    @property
    def std(self) -> np.ndarray:
        """What the norm would divide by, if its averages were right; [c]."""
        return np.sqrt(self.train.var.mean(0) + self.layer.module.epsilon)

    @property
    def live(self) -> np.ndarray:
        """Which channels return something that varies, bool [c]."""
        var = self.batch.var.mean(0)
        std = np.abs(self.scale) * np.sqrt(var / (var + self.layer.module.epsilon))
        return (std > limit("dead") * np.sqrt(np.mean(std**2))) & (std > 0)

    @property
    def drift(self) -> np.ndarray:
        """Stored minus expected mean of live channels, in standard deviations [c]."""
        return ((self.mean - self.train.mean.mean(0)) / self.std)[self.live]

    @property
    def log_ratio(self) -> np.ndarray:
        """The log of stored over expected variance of live channels, epsilon added to both [c]."""
        stored = np.maximum(self.var, 0) + self.layer.module.epsilon
        return np.log(stored / self.std**2)[self.live]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that can be run, and the examples that it is run on.

    Attributes:
        model, params, batch_stats: the network.
        batches: as `observe` takes them, the largest first; each is there for as long as the audit
            is.
        jit: compiles a function.
        watch: shows how far a pass is.
    """

    model: nn.Module
    params: Params
    batch_stats: BatchStats
    batches: Sequence[Batch]
    jit: Callable[..., Any]
    watch: Watch

    @functools.cached_property
    def _logits(self) -> Any:
        return self.jit(functools.partial(_logits, model=self.model))

    @functools.cached_property
    def layers(self) -> tuple[NormLayer, ...]:
        """Its norms, as evaluation calls them."""
        return norm_layers(self.model, self.params, self.batch_stats, self.batches[0], train=False)

    @property
    def examples(self) -> int:
        """How many real ones there are."""
        return sum(map(real_examples, self.batches))

    @functools.cached_property
    def whole(self) -> int:
        """How many of the batches, from the first on, tell how much batches differ.

        Those of at least half as many examples as the first: what a rest of a few has for mean and
        variance is chance, and would count as much as a whole batch's.
        """
        return sum(2 * real_examples(one) >= real_examples(self.batches[0]) for one in self.batches)

    def logits(self, batch_stats: BatchStats, name: str) -> np.ndarray:
        """Returns the logits of all real examples under some statistics, [n, classes]."""
        found = [
            np.asarray(self._logits(self.params, batch_stats, inputs(batch)))
            for batch in self.watch(self.batches, name)
        ]
        return _real(found, self.batches)

    def one(self, batch: Batch) -> np.ndarray:
        """Returns the logits of a batch as the model evaluates it."""
        return np.asarray(self._logits(self.params, self.batch_stats, inputs(batch)), np.float32)

    @functools.cached_property
    def labels(self) -> np.ndarray | None:
        """The labels of all real examples; None if a batch has none."""
        if not all("label" in batch for batch in self.batches):
            return None
        return _real([batch["label"] for batch in self.batches], self.batches)

    def means(self, logits: np.ndarray) -> dict[str, float]:
        """Returns loss and accuracy, if there are labels."""
        if self.labels is None:
            return {}
        losses = np.asarray(softmax_cross_entropy(jnp.asarray(logits), jnp.asarray(self.labels)))
        right = logits.argmax(-1) == self.labels
        return {"loss": float(losses.mean()), "accuracy": float(right.mean())}


@dataclasses.dataclass(frozen=True)
class Measured:
    """All evidence.

    Attributes:
        layers: of each norm.
        precise: the statistics of all examples.
        expected: what the averages would be if training had been at these weights for ever.
        batch_logits: where every norm normalises by the batch.
    """

    layers: tuple[Evidence, ...]
    precise: BatchStats
    expected: BatchStats
    batch_logits: np.ndarray


def measure(network: Network) -> Measured:
    """Runs the network as in training and as in evaluation with each batch's own statistics."""
    params, stats, batches = network.params, network.batch_stats, network.batches
    start, key = nothing_seen(stats), jax.random.key(0)
    run: dict[Mode, Any] = {
        mode: network.jit(functools.partial(observe, model=network.model, mode=mode))
        for mode in ("train", "batch")
    }
    seen: dict[str, list[Any]] = {"train": [], "batch": []}
    logits = []
    for i, batch in enumerate(network.watch(batches, "what the norms are given")):
        pieces = inputs(batch)
        its_logits, given = run["batch"](params, stats, start, pieces)
        seen["batch"].append(jax.device_get(given))
        logits.append(its_logits)
        _, given = run["train"](params, stats, start, pieces, dropout=jax.random.fold_in(key, i))
        seen["train"].append(jax.device_get(given))
    other_key = jax.random.key(1)
    _, again = run["train"](params, stats, start, inputs(batches[0]), dropout=other_key)
    again = jax.device_get(again)

    examples = real_examples(batches[0])
    scales, stored = flatten_dict(dict(params)), flatten_dict(dict(stats))
    layers, means = [], {}
    for layer in network.layers:
        path = layer.path
        leaf = np.asarray(stored[*path, "mean"])
        scale = np.broadcast_to(np.asarray(scales.get((*path, "scale"), 1.0)), leaf.shape)
        full = math.prod(layer.shape[axis] for axis in layer.axes)
        real = full * examples / len(batches[0]["image"])
        train, by_batch = (
            _given([one[path] for one in seen[mode]][: network.whole], layer) for mode in seen
        )
        layers.append(
            Evidence(
                layer=layer,
                mean=_flat(leaf),
                var=_flat(stored[*path, "var"]),
                dtype=stored[*path, "mean"].dtype,
                scale=_flat(scale),
                train=train,
                batch=by_batch,
                random=not np.array_equal(again[path].mean, seen["train"][0][path].mean)
                or not np.array_equal(again[path].var, seen["train"][0][path].var),
                calls=max(1, round(by_batch.count / max(real, 1))),
                examples=examples,
                shape=leaf.shape,
            )
        )
        for name, values in (("mean", train.mean), ("var", train.var)):
            means[*path, name] = (
                values.mean(0).reshape(leaf.shape).astype(stored[*path, name].dtype)
            )
    pooled = functools.reduce(_merge, seen["batch"], start)
    return Measured(
        layers=tuple(layers),
        precise=put(stats, pooled, network.layers),
        expected=unflatten_dict(stored | means),
        batch_logits=_real(logits, batches),
    )


def distance(logits: np.ndarray, others: np.ndarray) -> float:
    """Returns the mean total variation distance of two sets of predictions, 0 to 1; NaN counts 1.

    >>> distance(np.array([[0.0, 0.0]]), np.array([[0.0, np.inf]]))
    1.0
    """
    one, other = (_softmax(np.asarray(of, np.float64)) for of in (logits, others))
    return float(np.nan_to_num(0.5 * np.abs(one - other).sum(-1), nan=1.0).mean())


def real_examples(batch: Batch) -> int:
    """Returns how many examples of a batch are no padding."""
    return int(np.sum(batch["mask"])) if "mask" in batch else len(batch["image"])


def inputs(batch: Batch) -> Batch:
    """Returns what a network is given of a batch."""
    return {name: batch[name] for name in ("image", "mask") if name in batch}


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)


def _logits(params: Params, batch_stats: BatchStats, batch: Batch, *, model: nn.Module) -> Any:
    # What a model writes whose flag has no effect is dropped: `batch_dependent` finds it.
    mutable = ("batch_stats",)
    return forward(params, batch_stats, batch, model=model, train=False, mutable=mutable)[0]


def _given(moments: list[Moments], layer: NormLayer) -> Given:
    var = np.stack([_flat(one.var) for one in moments])
    if layer.variance == "unbiased":
        count = np.stack([_flat(one.count) for one in moments])
        var = var * (count / np.maximum(count - 1, 1))
    mean = np.stack([_flat(one.mean) for one in moments])
    return Given(mean, var, int(np.max(moments[0].count)))


def _merge(seen: Mapping[Any, Moments], more: Mapping[Any, Moments]) -> dict[Any, Moments]:
    return {path: merge(moments, more[path]) for path, moments in seen.items()}


def _flat(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64).ravel()


def _real(rows: Sequence[Any], batches: Sequence[Batch]) -> np.ndarray:
    return np.concatenate(
        [
            np.asarray(of_batch)[np.asarray(batch["mask"], bool)]
            if "mask" in batch
            else np.asarray(of_batch)
            for of_batch, batch in zip(rows, batches, strict=True)
        ]
    )
