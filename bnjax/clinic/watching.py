"""Monitors the norms of a network: metrics for a training loop, an assertion for tests."""

import dataclasses
from collections.abc import Callable, Iterable

import jax

from bnjax.clinic.checks import ILLNESSES, SECOND_BATCH, audit
from bnjax.clinic.measure import Run
from bnjax.clinic.network import SUPPORTED, Network
from bnjax.clinic.statistics import Drift, Gap, drift, gap, put
from bnjax.loss import LossFn, softmax_cross_entropy
from bnjax.types import Batch

_compiled = jax.jit(gap, static_argnames="loss_fn")


def vitals(
    network: Network, batch: Batch, *, loss_fn: LossFn = softmax_cross_entropy
) -> dict[str, float]:
    """Returns loss and accuracy under three kinds of statistics, and the drift of each norm.

    The keys are "loss/stored", "loss/batch", "loss/precise", the same with "accuracy", and for each
    norm "drift/NAME.mean" and "drift/NAME.variance" (see `bnjax.clinic.statistics.Drift`). For
    "precise", the even rows of the batch are evaluated with the statistics of the odd rows, and
    vice versa. If the stored loss is above the precise loss, the averages are wrong. If the precise
    loss is above the batch loss, predictions depend on the rest of the batch.

    Takes six passes without gradients, about the time of two training steps. The program is
    compiled once for each model, batch shape and `loss_fn`; new weights and statistics need no new
    compilation.

    Args:
        network: a network.
        batch: training data with an even number n of examples: `image` [n, h, w, c], `label` int
            [n], and optionally `mask` bool [n].
        loss_fn: as for `bnjax.train_step.train_step`.

    Raises:
        ValueError: if the number of examples is odd, one half has only masked examples, or the
            network has no batch norm.
    """
    if len(batch["image"]) % 2:
        raise ValueError(
            f"{len(batch['image'])} examples cannot be split in two halves: drop one example"
        )

    def run(network: Network, batch: Batch) -> Gap:
        return _compiled(network, batch, loss_fn=loss_fn)

    found, drifts = examine(network, batch, run)
    if not drifts:
        raise ValueError(f"there is nothing to measure: this needs {SUPPORTED} in the network")
    halves = [jax.tree.map(lambda leaf, i=i: leaf[i::2], dict(batch)) for i in (0, 1)]
    layers = network.norms(batch)
    precise = []
    for half, other in (halves, halves[::-1]):
        stats = put(network.batch_stats, run(network, other).seen, layers)
        precise.append(run(dataclasses.replace(network, batch_stats=stats), half).stored)
    metrics = {
        "stored": found.stored,
        "batch": found.batch,
        "precise": precise[0].merge(precise[1]),
    }
    values = {
        f"{key}/{name}": value for name, of in metrics.items() for key, value in of.means().items()
    }
    for name, one in drifts.items():
        values |= {f"drift/{name}.{of}": value for of, value in one._asdict().items()}
    return values


def examine(
    network: Network, batch: Batch, gap: Callable[[Network, Batch], Gap]
) -> tuple[Gap, dict[str, Drift]]:
    """Returns the gap of a network on a batch as host values, and the drift of each norm.

    Args:
        network: a network.
        batch: as for `gap`.
        gap: `bnjax.clinic.gap`, compiled.
    """
    found, layers = jax.device_get(gap(network, batch)), network.norms(batch)
    stats = network.batch_stats
    return found, drift(stats, put(stats, found.seen, layers), layers)


def assert_healthy(
    network: Network,
    batches: Iterable[Batch],
    *,
    allow: str | Iterable[str] = (),
    run: Run | None = None,
) -> None:
    """Audits a network in a test; raises an AssertionError with the findings and their cures.

    Checks that need facts about the training run are skipped without `run`, as in `audit`.

    Args:
        network: as for `audit`.
        batches: as for `audit`.
        allow: the names of accepted findings, such as "small-batch".
        run: facts about the training run.

    Raises:
        AssertionError: if there is any other finding, nothing to audit, or no second batch of at
            least half the size of the first.
        ValueError: if `allow` has an unknown name.
    """
    allowed = [allow] if isinstance(allow, str) else [*allow]
    if unknown := [name for name in allowed if name not in ILLNESSES]:
        raise ValueError(
            f"allow has unknown names {unknown}; known names are {', '.join(ILLNESSES)}"
        )
    findings = audit(network, batches, run)
    found = [one for one in findings.found if one.id not in allowed]
    texts = [*map(str, found)]
    if not findings.layers:
        texts += [f"nothing was audited: this needs {one.missing}" for one in findings.not_checked]
    elif unchecked := [one.id for one in findings.not_checked if one.missing == SECOND_BATCH]:
        texts.append(f"not checked: {', '.join(unchecked)}; this needs {SECOND_BATCH}")
    if texts:
        names = tuple(dict.fromkeys([*allowed, *(one.id for one in found)]))
        accept = (
            f"To accept these findings: clinic.assert_healthy(…, allow={names})." if found else ""
        )
        raise AssertionError(
            "\n\n".join(["the batch norms are not healthy:", *texts, accept]).strip()
        )
