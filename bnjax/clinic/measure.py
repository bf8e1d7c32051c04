"""Measures a network for an audit, by running it in several modes on the same batches."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.network import Mode, Network, NormLayer, check, nothing_seen
from bnjax.clinic.statistics import deviations, put
from bnjax.loss import softmax_cross_entropy
from bnjax.metrics import from_losses
from bnjax.norms.moments import Moments, merge
from bnjax.types import Batch, BatchStats, Images, Logits

# A channel is dead if the standard deviation of its output is below this fraction of the RMS of
# these standard deviations over the layer. The fraction is half a unit in the last place of
# bfloat16, so a bfloat16 sum over channels rounds the channel away.
DEAD = 2.0**-8
ROUNDED = 1e-6  # the largest difference between statistics that agree except for rounding errors


@dataclasses.dataclass(frozen=True)
class Run:
    """Facts about a training run; unknown facts are None.

    Attributes:
        steps: the number of training steps since initialisation.
        batch_size: the number of examples that share statistics: all examples of a step, or the
            examples on one device if the norms have no axis_name.
        weights: the `bnjax.types.fingerprint` of the weights to which the statistics belong.
        tx: the optimizer, with `init` and `update` as in Optax; it is called with small arrays.
        predict: the evaluation function, images [n, h, w, c] -> logits [n, classes]; None to
            use evaluation mode.
        step: a training step, (network, batch) -> updated network; it is called with copies of the
            network.
        before: the network before training, if norms were frozen.
        frozen: shell patterns for the names of the frozen norms; empty for all norms of `before`.
    """

    steps: int | None = None
    batch_size: int | None = None
    weights: str | None = None
    tx: Any = None
    predict: Callable[[Images], Logits] | None = None
    step: Callable[[Network, Batch], Network] | None = None
    before: Network | None = None
    frozen: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The measurements of one norm, float64; the channels are flattened to one axis [c].

    Attributes:
        layer: the norm in evaluation.
        mean, var: the stored statistics, [c].
        dtype, shape: the dtype and shape of the stored statistics.
        scale: the absolute value of the learnt scale, [c]; ones if the norm has no scale. If the
            layers of a scan share statistics, the largest value over these layers.
        train: the mean and variance of the inputs in training, with dropout, for each of k batches,
            [k, c]; `count` is the count of the first batch.
        batch: the same without dropout, when every norm normalises by batch statistics.
        random: whether the inputs in training depend on the dropout key.
        calls: the number of calls per pass.
        examples: the number of examples in an audited batch.
        size: the number of examples in a training batch; if unknown, the same as `examples`.
        updates: the number of updates of the averages; None if unknown.
    """

    layer: NormLayer
    mean: np.ndarray
    var: np.ndarray
    dtype: Any
    shape: tuple[int, ...]
    scale: np.ndarray
    train: Moments
    batch: Moments
    random: bool
    calls: int
    examples: int
    size: int
    updates: int | None

    @functools.cached_property
    def live(self) -> np.ndarray:
        """Whether the output of each channel varies, bool [c]."""
        var = self.batch.var.mean(0)
        std = np.abs(self.scale) * np.sqrt(var / (var + self.layer.module.epsilon))
        return np.asarray((std > DEAD * np.sqrt(np.mean(std**2))) & (std > 0))

    @functools.cached_property
    def finite(self) -> np.ndarray:
        """Whether the inputs of each channel are finite, bool [c]."""
        return np.all(np.isfinite(self.batch.mean + self.batch.var), axis=0)

    @functools.cached_property
    def std(self) -> np.ndarray:
        """The divisor that the norm would have with correct averages, [c]."""
        return np.sqrt(self.train.var.mean(0) + self.layer.module.epsilon)

    @functools.cached_property
    def _deviations(self) -> Any:
        true = self.train.mean.mean(0), self.train.var.mean(0)
        return deviations(self.mean, np.maximum(self.var, 0), *true, self.layer.module.epsilon)

    @property
    def drift(self) -> np.ndarray:
        """The stored minus the expected mean of live channels, in standard deviations."""
        return self._deviations[0][self.live]

    @property
    def log_ratio(self) -> np.ndarray:
        """The log of the ratio of stored to expected variance, for live channels."""
        return self._deviations[1][self.live]

    @property
    def distance_from_zero(self) -> float:
        """The expected mean in standard deviations (RMS over live channels)."""
        return rms((self.train.mean.mean(0) / self.std)[self.live])

    @property
    def shifts(self) -> np.ndarray:
        """The mean log ratio of the variances with and without dropout, per batch [k]."""
        epsilon = self.layer.module.epsilon
        logs = np.log((self.train.var + epsilon) / (self.batch.var + epsilon))
        return logs[:, self.live].mean(1) if self.live.any() else np.zeros(len(logs))

    @property
    def noise(self) -> float | None:
        """The standard error of the mean of a training batch, in standard deviations.

        The RMS over live channels; None if there is only one batch.
        """
        if len(self.train.mean) < 2:
            return None
        deviation = self.train.mean.std(0, ddof=1) / self.std
        return rms(deviation[self.live]) * (self.examples / self._shared) ** 0.5

    @property
    def values(self) -> int:
        """The number n of values per channel in a training batch."""
        return round(self.train.count / self.calls / self.examples * self._shared)

    @property
    def _shared(self) -> int:
        return min(self.size, getattr(self.layer.module, "virtual_batch", self.size))

    @property
    def momentum(self) -> float | None:
        """The momentum of the averages; None if it depends on the number of updates."""
        momentum = self.layer.module.momentum
        return momentum if isinstance(momentum, int | float) else None

    @property
    def initial_share(self) -> float | None:
        """The weight of the initial values in the averages; None if unknown."""
        if self.updates is None or getattr(self.layer.module, "debias", False):
            return None
        return None if self.momentum is None else self.momentum**self.updates

    @functools.cached_property
    def z_scores(self) -> tuple[float, float]:
        """The errors of the stored mean and log variance, in standard errors (RMS over channels).

        An exponential average, with momentum m, of independent values with variance s^2 has
        variance (1-m) / (1+m) s^2, where s^2 is that of a training batch: the variance of the
        audited batches times their size over the training batches' size. The expected value is a
        mean over k audited batches. With a momentum schedule the average counts as one batch, and
        with the plain mean over all batches as exact.
        """
        left = 1.0 if callable(self.layer.module.momentum) else 0.0
        if self.momentum is not None:
            left = (1 - self.momentum) / (1 + self.momentum)
        factor = math.sqrt(left * self.examples / self.size + 1 / len(self.train.mean))
        of_mean = rms((self.train.mean.std(0, ddof=1) / self.std)[self.live]) * factor
        of_var = rms((self.train.var.std(0, ddof=1) / self.std**2)[self.live]) * factor
        return rms(self.drift) / max(of_mean, ROUNDED), rms(self.log_ratio) / max(of_var, ROUNDED)


@dataclasses.dataclass(frozen=True)
class Case:
    """The inputs to all checks.

    Attributes:
        network: the network.
        batches: the audited batches, the largest first.
        run: facts about the training run.
        layers: the measurements of each norm.
        precise: the statistics over all examples.
        expected: the values to which the averages converge in training with constant weights.
        batch_logits: the logits when every norm normalises by batch statistics.
        whole: the number of batches that are large enough to measure differences between batches.
        evaluate: (batch_stats, batch) -> logits [n, classes] in evaluation.
    """

    network: Network
    batches: Sequence[Batch]
    run: Run
    layers: tuple[Evidence, ...]
    precise: BatchStats
    expected: BatchStats
    batch_logits: np.ndarray
    whole: int
    evaluate: Callable[[BatchStats, Batch], Logits]

    @property
    def has_labels(self) -> bool:
        """Whether every batch has labels."""
        return all("label" in batch for batch in self.batches)

    def logits_under(self, batch_stats: BatchStats) -> np.ndarray:
        """Evaluates with these statistics; returns the logits [n, classes] of unmasked examples."""
        return _real([self.evaluate(batch_stats, batch) for batch in self.batches], self.batches)

    def means(self, logits: np.ndarray) -> dict[str, float]:
        """Returns loss and accuracy; an empty dict if the batches have no labels."""
        if not self.has_labels:
            return {}
        label = jnp.asarray(_real([batch["label"] for batch in self.batches], self.batches))
        losses = softmax_cross_entropy(jnp.asarray(logits), label)
        return from_losses(losses, jnp.asarray(logits), label, None).means()


def measure(
    network: Network, batches: Sequence[Batch], run: Run, jit: Callable[..., Any] = jax.jit
) -> Case:
    """Measures a network as in training, and as in evaluation with the statistics of each batch.

    Args:
        network: a network whose variables have the structure that the model expects.
        batches: the batches, the largest first.
        run: facts about the training run.
        jit: the function used for compilation.
    """
    params, stats = network.params, network.batch_stats
    start, key = nothing_seen(stats), jax.random.key(0)

    def observed(mode: Mode) -> Callable[..., Any]:
        observe = jit(functools.partial(type(network).observe, mode=mode))
        return lambda *of, **key: jax.device_get(observe(network, start, *of, **key))

    train, batch = observed("train"), observed("batch")
    logits, in_evaluation = zip(*map(batch, batches), strict=True)
    in_training = [
        train(one, dropout=jax.random.fold_in(key, i))[1] for i, one in enumerate(batches)
    ]
    again = train(batches[0], dropout=jax.random.key(1))[1]
    evaluate = jit(functools.partial(type(network).run, train=False))

    examples = real_examples(batches[0])
    # Counts only batches of at least half the size of the largest one: the statistics of smaller
    # batches are noisier, and the estimate gives every batch the same weight.
    whole = sum(2 * real_examples(one) >= examples for one in batches)
    scales, stored = flatten_dict(dict(params)), flatten_dict(dict(stats))
    norms, layers, expected = network.norms(batches[0]), [], dict(stored)
    for layer in norms:
        path, mean = layer.path, np.asarray(stored[*layer.path, "mean"])
        given, own = (
            _moments([one[path] for one in seen[:whole]], layer)
            for seen in (in_training, in_evaluation)
        )
        values = math.prod(layer.shape[axis] for axis in layer.axes) / len(batches[0]["image"])
        calls = max(1, round(own.count / max(values * examples, 1)))
        count = stored.get((*path, "count"))
        steps = None if run.steps is None else run.steps * calls
        layers.append(
            Evidence(
                layer=layer,
                mean=_flat(mean),
                var=_flat(stored[*path, "var"]),
                dtype=mean.dtype,
                shape=mean.shape,
                scale=_largest(scales.get((*path, "scale"), np.ones(mean.shape)), mean.shape),
                train=given,
                batch=own,
                random=not all(map(np.array_equal, again[path], in_training[0][path])),
                calls=calls,
                examples=examples,
                size=run.batch_size or examples,
                updates=steps if count is None else int(np.min(count)),
            )
        )
        for name, found in (("mean", given.mean), ("var", given.var)):
            leaf = stored[*path, name]
            expected[*path, name] = found.mean(0).reshape(mean.shape).astype(leaf.dtype)
    all_seen = functools.reduce(
        lambda seen, more: {path: merge(one, more[path]) for path, one in seen.items()},
        in_evaluation,
        start,
    )
    return Case(
        network=network,
        batches=batches,
        run=run,
        layers=tuple(layers),
        precise=put(stats, all_seen, norms),
        expected=unflatten_dict(expected),
        batch_logits=_real(logits, batches),
        whole=whole,
        evaluate=lambda batch_stats, batch: evaluate(
            dataclasses.replace(network, batch_stats=batch_stats), batch
        )[0],
    )


def distance(logits: np.ndarray, others: np.ndarray) -> float:
    """Returns the mean total variation distance between predictions, 0 to 1; NaN counts as 1.

    >>> distance(np.array([[0.0, 0.0]]), np.array([[0.0, np.inf]]))
    1.0
    """
    with np.errstate(invalid="ignore", over="ignore"):
        one, other = (jax.nn.softmax(np.float32(of)) for of in (logits, others))
    return float(np.nan_to_num(0.5 * np.abs(one - other).sum(-1), nan=1.0).mean())


def rms(values: Any) -> float:
    """Returns the root mean square; 0 for an empty array."""
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def real_examples(batch: Batch) -> int:
    """Returns the number of unmasked examples in a batch."""
    check(batch)
    return int(np.sum(batch["mask"])) if "mask" in batch else len(batch["image"])


def _moments(seen: Sequence[Moments], layer: NormLayer) -> Moments:
    mean, var, count = (
        np.stack([_flat(leaf) for leaf in leaves]) for leaves in zip(*seen, strict=True)
    )
    if layer.variance == "unbiased":
        var = var * (count / np.maximum(count - 1, 1))
    return Moments(mean, var, int(count[0].max()))


def _largest(scale: Any, shape: tuple[int, ...]) -> np.ndarray:
    extra = tuple(range(np.ndim(scale) - len(shape)))
    return _flat(np.broadcast_to(np.abs(np.float64(scale)).max(extra), shape))


def _flat(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64).ravel()


def _real(rows: Sequence[Any], batches: Sequence[Batch]) -> np.ndarray:
    masks = [np.asarray(one.get("mask", np.ones(len(one["image"]))), bool) for one in batches]
    return np.concatenate([np.asarray(of)[mask] for of, mask in zip(rows, masks, strict=True)])
