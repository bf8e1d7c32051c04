"""A network under audit: what is known of its training, and what was measured."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bnjax.clinic.evidence import Evidence, Measured, Network
from bnjax.clinic.findings import Finding, NotChecked
from bnjax.types import Images, Logits

Outcome = Iterator[Finding | NotChecked]


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a training; None for what is not.

    Attributes:
        steps: of training, that is updates of the averages since they were 0 and 1.
        batch_size: examples that share their statistics: of a step, or of one device if the norms
            have no axis_name.
        weights: `bnjax.types.fingerprint` of the weights that the statistics were averaged with.
        tx: the optimizer, with `init` and `update` as Optax's; tried on arrays of one number.
        predict: images [n, h, w, c] -> logits [n, classes], as the network is evaluated; None for
            `model.apply(…, train=False)`.
    """

    steps: int | None = None
    batch_size: int | None = None
    weights: str | None = None
    tx: Any = None
    predict: Callable[[Images], Logits] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """What every check looks at.

    Attributes:
        network: what can be run.
        measured: from it.
        run: what is known of its training.
        explained: the layers, by name, whose statistics are known to be wrong by now.
    """

    network: Network
    measured: Measured
    run: Run
    explained: frozenset[str] = frozenset()

    @property
    def layers(self) -> tuple[Evidence, ...]:
        """The evidence of each norm."""
        return self.measured.layers

    @property
    def batches(self) -> int:
        """How many tell how much batches differ."""
        return self.network.whole


def momentum_of(evidence: Evidence) -> Any:
    """Returns the momentum of a norm: a number, a function, or None for the mean of all batches."""
    return evidence.layer.module.momentum


def rms(values: np.ndarray) -> float:
    """Returns the root of the mean square, 0 of nothing."""
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0


def noise_of(evidence: Evidence, batch_size: int | None) -> float | None:
    """Returns by how much a training batch's mean varies, in standard deviations.

    RMS over live channels; None if there is but one batch to tell from. With `batch_size` None a
    training batch is as large as those that were looked at.
    """
    if len(evidence.train.mean) < 2:
        return None
    size = batch_size or evidence.examples
    size = min(size, getattr(evidence.layer.module, "virtual_batch", size))
    deviation = evidence.train.mean.std(0, ddof=1) / evidence.std
    return rms(deviation[evidence.live]) * (evidence.examples / size) ** 0.5


def count_of(evidence: Evidence, batch_size: int | None) -> int:
    """Returns n, the values for each channel and training batch."""
    per_example = evidence.train.count / evidence.calls / evidence.examples
    size = batch_size or evidence.examples
    return round(per_example * min(size, getattr(evidence.layer.module, "virtual_batch", size)))
