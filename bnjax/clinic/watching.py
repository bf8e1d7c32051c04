"""Watches a network: its vital signs during training, and an assertion for a test suite."""

import dataclasses
from collections.abc import Callable, Iterable

import jax

from bnjax.clinic.checks import ILLNESSES, audit
from bnjax.clinic.measure import Run
from bnjax.clinic.network import Network
from bnjax.clinic.statistics import Drift, Gap, drift, gap, put
from bnjax.train_step import LossFn, softmax_cross_entropy
from bnjax.types import Batch

_compiled = jax.jit(gap, static_argnames="loss_fn")


def vitals(
    network: Network, batch: Batch, *, loss_fn: LossFn = softmax_cross_entropy
) -> dict[str, float]:
    """Returns loss and accuracy under three statistics, and the drift of each norm.

    The keys are "loss/stored", "loss/batch", "loss/precise", the same with "accuracy", and for each
    norm "drift/NAME.mean" and "drift/NAME.variance", see `bnjax.clinic.statistics.Drift`. "precise"
    evaluates each half of the batch, its even and its odd rows, with the statistics of the other
    half. Stored above precise: the averages are wrong. Precise above batch: the predictions depend
    on the other examples of a batch.

    Six passes without gradients, as long as two training steps. The program is compiled once for
    each model, shape of a batch and `loss_fn`; other weights and statistics use the same program.

    Args:
        network: its norms may have any statistics.
        batch: training data of even size: `image` [n, h, w, c], `label` int [n], and optionally
            `mask` bool [n].
        loss_fn: as for `bnjax.train_step.train_step`.

    Raises:
        ValueError: if the number of examples is odd, or half of them has no real one.
    """
    if len(batch["image"]) % 2:
        raise ValueError(f"{len(batch['image'])} examples have no two equal halves: leave one out")

    def run(network: Network, batch: Batch) -> Gap:
        return _compiled(network, batch, loss_fn=loss_fn)

    found, drifts = examine(network, batch, run)
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
    """Returns the gap of a network on a batch, on the host, and the drift of each norm.

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
    allow: str | Iterable[str] = (),
    run: Run | None = None,
) -> None:
    """Audits a network in a test; raises an AssertionError with what was found, and the cures.

    All checks are made whose facts are known: the others need a `Run`, as for `audit`.

    Args:
        network: as for `audit`.
        batches: as for `audit`.
        allow: names of findings that are accepted, such as "small-batch".
        run: facts about the training.

    Raises:
        AssertionError: if there is another finding, or nothing to audit.
        ValueError: if `allow` has a name that no finding has.
    """
    allowed = [allow] if isinstance(allow, str) else [*allow]
    if unknown := [name for name in allowed if name not in ILLNESSES]:
        raise ValueError(f"allow = {unknown} is no finding: these are {', '.join(ILLNESSES)}")
    findings = audit(network, batches, run)
    found = [one for one in findings.found if one.id not in allowed]
    texts = [*map(str, found)]
    if not findings.layers:
        texts += [f"nothing was audited, for want of {one.missing}" for one in findings.not_checked]
    if texts:
        names = tuple(dict.fromkeys([*allowed, *(one.id for one in found)]))
        accept = f"To accept findings: clinic.assert_healthy(…, allow={names})." if found else ""
        raise AssertionError(
            "\n\n".join(["the batch norms are not healthy:", *texts, accept]).strip()
        )
