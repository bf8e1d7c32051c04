"""The measurements of an audit: one network, run in several ways on the same batches."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.linen import Mode, Network, NormLayer, nothing_seen, observe, run_unsynced
from bnjax.clinic.statistics import deviations, put
from bnjax.norms.moments import Moments, merge
from bnjax.train_step import softmax_cross_entropy
from bnjax.types import Batch, BatchStats, Images, Logits

# A channel is dead if the standard deviation of its output is below this share of the layer's RMS:
# half a unit in the last place of bfloat16, which is lost when it is added to the others.
DEAD = 2.0**-8
# (batches, title) -> the batches, for a progress bar.
Progress = Callable[[Sequence[Batch], str], Iterable[Batch]]


@dataclasses.dataclass(frozen=True)
class Run:
    """The facts of a training; None if unknown.

    Attributes:
        steps: of training: updates of the averages since they were 0 and 1.
        batch_size: the examples that share statistics: of a step, or of one device if the norms
            have no axis_name.
        weights: `bnjax.types.fingerprint` of the weights that the statistics were averaged with.
        tx: the optimizer, with `init` and `update` as in Optax; it is tried on small arrays.
        predict: images [n, h, w, c] -> logits [n, classes], as the network is evaluated; None for
            `train=False`.
    """

    steps: int | None = None
    batch_size: int | None = None
    weights: str | None = None
    tx: Any = None
    predict: Callable[[Images], Logits] | None = None


@dataclasses.dataclass(frozen=True)
class Given:
    """The inputs of one norm in each of k batches; the c channels are one axis, float64.

    Attributes:
        mean, var: [k, c].
        count: the values for each channel in the first batch.
    """

    mean: np.ndarray
    var: np.ndarray
    count: int


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The measurements of one norm.

    Attributes:
        layer: the norm, as evaluation calls it.
        mean, var: the stored statistics, [c] float64.
        dtype: of the stored statistics.
        scale: learnt, [c]; ones if there is none.
        train: its inputs in training, with dropped units.
        batch: its inputs where every norm normalises by the batch and no unit is dropped.
        random: whether its inputs in training depend on the dropout key.
        calls: the number of calls in a pass.
        examples: of an audited batch.
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

    @functools.cached_property
    def live(self) -> np.ndarray:
        """The channels whose output varies, bool [c]."""
        var = self.batch.var.mean(0)
        std = np.abs(self.scale) * np.sqrt(var / (var + self.layer.module.epsilon))
        return (std > DEAD * np.sqrt(np.mean(std**2))) & (std > 0)

    @functools.cached_property
    def std(self) -> np.ndarray:
        """The divisor of the norm if its averages were right, [c]."""
        return np.sqrt(self.train.var.mean(0) + self.layer.module.epsilon)

    @functools.cached_property
    def _deviations(self) -> Any:
        true, epsilon = (self.train.mean.mean(0), self.train.var.mean(0)), self.layer.module.epsilon
        return deviations(self.mean, np.maximum(self.var, 0), *true, epsilon)

    @property
    def drift(self) -> np.ndarray:
        """Stored minus expected mean of the live channels, in standard deviations."""
        return self._deviations[0][self.live]

    @property
    def log_ratio(self) -> np.ndarray:
        """Log of stored over expected variance of the live channels."""
        return self._deviations[1][self.live]

    @property
    def distance_from_zero(self) -> float:
        """The expected mean in standard deviations, RMS over the live channels."""
        return rms((self.train.mean.mean(0) / self.std)[self.live])

    def shifts(self) -> np.ndarray:
        """Returns the mean log ratio of variances with and without dropped units, of each batch."""
        epsilon = self.layer.module.epsilon
        logs = np.log((self.train.var + epsilon) / (self.batch.var + epsilon))
        return logs[:, self.live].mean(1) if self.live.any() else np.zeros(len(logs))

    def noise(self, batch_size: int | None) -> float | None:
        """Returns the standard deviation of a training batch's mean, in standard deviations.

        RMS over live channels; None of a single batch. `batch_size` None: of the audited batches.
        """
        if len(self.train.mean) < 2:
            return None
        deviation = self.train.mean.std(0, ddof=1) / self.std
        return rms(deviation[self.live]) * (self.examples / self._size(batch_size)) ** 0.5

    def values(self, batch_size: int | None) -> int:
        """Returns n, the number of values for each channel and training batch."""
        return round(self.train.count / self.calls / self.examples * self._size(batch_size))

    def _size(self, batch_size: int | None) -> int:
        size = batch_size or self.examples
        return min(size, getattr(self.layer.module, "virtual_batch", size))


@dataclasses.dataclass(frozen=True)
class Case:
    """Everything that the checks look at.

    Attributes:
        network: the network.
        batches: the audited batches, the largest first.
        run: the facts of its training.
        layers: the measurements of each norm.
        precise: the statistics of all examples.
        expected: the averages that infinite training at these weights would give.
        batch_logits: the logits where every norm normalises by the batch.
        logits_under: (batch_stats, title) -> the logits of all real examples [n, classes].
        predict: images -> logits [n, classes], as the model evaluates them.
        explained: the names of layers whose statistics are wrong for a known reason.
    """

    network: Network
    batches: Sequence[Batch]
    run: Run
    layers: tuple[Evidence, ...]
    precise: BatchStats
    expected: BatchStats
    batch_logits: np.ndarray
    logits_under: Callable[[BatchStats, str], np.ndarray]
    predict: Callable[[Images], Logits]
    explained: frozenset[str] = frozenset()

    @property
    def whole(self) -> int:
        """The number of batches from which the differences between batches are learnt."""
        return whole_batches(self.batches)

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


def measure(
    network: Network,
    batches: Sequence[Batch],
    run: Run,
    jit: Callable[..., Any] = jax.jit,
    progress: Progress = lambda batches, title: batches,
) -> Case:
    """Runs the network as in training, and as in evaluation with each batch's own statistics.

    Args:
        network: with the variables that its model wants.
        batches: the largest first.
        run: the facts of its training.
        jit: compiles a function.
        progress: shows the progress of a pass over the batches.
    """
    params, stats, model = network.params, network.batch_stats, network.model
    norms, start, key = network.norms(batches[0]), nothing_seen(stats), jax.random.key(0)
    passes: dict[Mode, Any] = {
        mode: jit(functools.partial(observe, model=model, mode=mode)) for mode in ("train", "batch")
    }
    in_training: list[Any] = []
    in_evaluation: list[Any] = []
    logits = []
    for i, batch in enumerate(progress(batches, "inputs of the norms")):
        its_logits, seen = passes["batch"](params, stats, start, inputs(batch))
        in_evaluation.append(jax.device_get(seen))
        logits.append(its_logits)
        dropout = jax.random.fold_in(key, i)
        _, seen = passes["train"](params, stats, start, inputs(batch), dropout=dropout)
        in_training.append(jax.device_get(seen))
    dropout = jax.random.key(1)
    _, again = passes["train"](params, stats, start, inputs(batches[0]), dropout=dropout)
    again = jax.device_get(again)

    # A model whose flag has no effect writes in evaluation; `batch_dependent` finds that.
    evaluate = jit(
        functools.partial(run_unsynced, model=model, train=False, mutable=("batch_stats",))
    )

    def logits_under(batch_stats: BatchStats, title: str) -> np.ndarray:
        found = [evaluate(params, batch_stats, inputs(one))[0] for one in progress(batches, title)]
        return _real(found, batches)

    whole, examples = whole_batches(batches), real_examples(batches[0])
    scales, stored = flatten_dict(dict(params)), flatten_dict(dict(stats))
    layers, expected = [], dict(stored)
    for layer in norms:
        path = layer.path
        mean = np.asarray(stored[*path, "mean"])
        scale = np.broadcast_to(np.asarray(scales.get((*path, "scale"), 1.0)), mean.shape)
        full = math.prod(layer.shape[axis] for axis in layer.axes)
        real = full * examples / len(batches[0]["image"])
        train, own = (
            _given([one[path] for one in seen[:whole]], layer)
            for seen in (in_training, in_evaluation)
        )
        first = in_training[0][path]
        layers.append(
            Evidence(
                layer=layer,
                mean=_flat(mean),
                var=_flat(stored[*path, "var"]),
                dtype=mean.dtype,
                scale=_flat(scale),
                train=train,
                batch=own,
                random=not np.array_equal(again[path].mean, first.mean)
                or not np.array_equal(again[path].var, first.var),
                calls=max(1, round(own.count / max(real, 1))),
                examples=examples,
                shape=mean.shape,
            )
        )
        for name, values in (("mean", train.mean), ("var", train.var)):
            leaf = stored[*path, name]
            expected[*path, name] = values.mean(0).reshape(mean.shape).astype(leaf.dtype)
    return Case(
        network=network,
        batches=batches,
        run=run,
        layers=tuple(layers),
        precise=put(stats, functools.reduce(_merge, in_evaluation, start), norms),
        expected=unflatten_dict(expected),
        batch_logits=_real(logits, batches),
        logits_under=logits_under,
        predict=lambda images: evaluate(params, stats, {"image": images})[0],
    )


def distance(logits: np.ndarray, others: np.ndarray) -> float:
    """Returns the mean total variation distance of two sets of predictions, 0 to 1; NaN counts 1.

    >>> distance(np.array([[0.0, 0.0]]), np.array([[0.0, np.inf]]))
    1.0
    """
    one, other = (_softmax(np.asarray(of, np.float64)) for of in (logits, others))
    return float(np.nan_to_num(0.5 * np.abs(one - other).sum(-1), nan=1.0).mean())


def rms(values: np.ndarray) -> float:
    """Returns the root of the mean square; 0 for no values."""
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def real_examples(batch: Batch) -> int:
    """Returns the number of examples of a batch that are no padding."""
    return int(np.sum(batch["mask"])) if "mask" in batch else len(batch["image"])


def whole_batches(batches: Sequence[Batch]) -> int:
    """Returns how many batches, from the first on, have at least half as many examples as it.

    The mean and variance of a small rest are mostly chance, and would count as much as a batch's.
    """
    return sum(2 * real_examples(one) >= real_examples(batches[0]) for one in batches)


def inputs(batch: Batch) -> Batch:
    """Returns the parts of a batch that a network takes."""
    return {name: batch[name] for name in ("image", "mask") if name in batch}


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        powers = np.exp(logits - logits.max(-1, keepdims=True))
        return powers / powers.sum(-1, keepdims=True)


def _given(moments: list[Moments], layer: NormLayer) -> Given:
    mean, var, count = (
        np.stack([_flat(leaf) for leaf in leaves]) for leaves in zip(*moments, strict=True)
    )
    if layer.variance == "unbiased":
        var = var * (count / np.maximum(count - 1, 1))
    return Given(mean, var, int(count[0].max()))


def _merge(seen: Mapping[Any, Moments], more: Mapping[Any, Moments]) -> dict[Any, Moments]:
    return {path: merge(moments, more[path]) for path, moments in seen.items()}


def _flat(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64).ravel()


def _real(rows: Sequence[Any], batches: Sequence[Batch]) -> np.ndarray:
    masks = [np.asarray(one.get("mask", np.ones(len(one["image"]))), bool) for one in batches]
    return np.concatenate([np.asarray(of)[mask] for of, mask in zip(rows, masks, strict=True)])
