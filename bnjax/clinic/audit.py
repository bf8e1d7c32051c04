"""The audit: are the running statistics of a trained network right, and if not, why."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bnjax.clinic import checks
from bnjax.clinic.case import Case, Outcome, Run, count_of, noise_of, rms
from bnjax.clinic.drift import unfinished_or_stale
from bnjax.clinic.evidence import (
    Evidence,
    Measured,
    Network,
    Watch,
    distance,
    measure,
    real_examples,
)
from bnjax.clinic.findings import Finding, Findings, NotChecked, Row
from bnjax.clinic.illnesses import ILLNESSES
from bnjax.clinic.mates import batch_dependent
from bnjax.clinic.optimizer import decay
from bnjax.clinic.structure import settle
from bnjax.types import Batch, Params

__all__ = ["Finding", "Findings", "NotChecked", "Run", "audit"]

# In this order: what the first ones find explains what the last would find again.
CHECKS: tuple[Callable[[Case], Outcome], ...] = (
    checks.never_updated,
    checks.invalid_statistics,
    checks.low_precision,
    checks.dead_channels,
    checks.epsilon_large,
    checks.small_batch,
    checks.variance_shift,
    decay,
    batch_dependent,
    unfinished_or_stale,
)
# Whoever has one of these has statistics that are wrong for a known reason.
EXPLAINING = ("never-updated", "invalid-statistics", "low-precision")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def audit(
    model: nn.Module,
    params: Params,
    batch_stats: Any,
    batches: Iterable[Batch],
    run: Run | None = None,
    *,
    jit: Callable[..., Any] = jax.jit,
    watch: Watch = lambda batches, name: batches,
) -> Findings:
    """Returns what is wrong with the batch norms of a trained network, and what was measured.

    The network is run on all batches as in training, and as in evaluation under the statistics of
    each batch, of all of them, and the stored ones; no file is read or written. Where healthy ends,
    and why there, stands in `bnjax.clinic.limits`.

    Args:
        model: any linen module with `__call__(x, train=...)`, its norms Flax's or bnjax's.
        params: its weights; perhaps with a leading axis of devices.
        batch_stats: its running statistics; likewise, or a list of one tree for each replica.
        batches: training images in random order, the better as large as training's: `image`
            [n, h, w, c], optionally `label` int [n], and `mask` bool [n] if the model takes it. Two
            at least, for what needs to know how much batches differ; four or more are better. From
            one that is less than half as large as the largest, as the rest of a set may be, that is
            not learnt. All are kept.
        run: what is known of the training. What cannot be checked without it is in `not_checked`.
        jit: compiles a function.
        watch: (batches, what for) -> the same, for a progress bar.

    Raises:
        ValueError: if there is no batch, fewer than two examples in each one, or a mask that
            the model does not take.
    """
    kept, run = sorted(batches, key=real_examples, reverse=True), run or Run()
    if not kept or len(kept[0]["image"]) < 2:
        raise ValueError("there is nothing to audit with: give a batch of at least two examples")
    if "mask" in kept[0] and "mask" not in inspect.signature(type(model).__call__).parameters:
        raise ValueError(
            f"the batches are padded, and {type(model).__name__}.__call__ takes no `mask`, so that "
            "its norms would count the padding in training. Give batches without padding."
        )
    mine, stats, found, usable = settle(model, params, batch_stats, np.asarray(kept[0]["image"]))
    if not usable:
        other = [name for name in ILLNESSES if name not in {one.id for one in found}]
        missing = "a checkpoint that fits the model; not looked at: " + ", ".join(other)
        return Findings(found, (NotChecked("all else", missing),))
    network = Network(model, mine, stats, kept, jit, watch)
    if not network.layers:
        missing = "a batch norm of Flax's or bnjax's in the model"
        return Findings(found, (NotChecked("all else", missing),))
    measured = measure(network)
    case, outcomes = Case(network, measured, run), [*found]
    not_checked = []
    for check in CHECKS:
        for outcome in check(case):
            if isinstance(outcome, NotChecked):
                not_checked.append(outcome)
                continue
            outcomes.append(outcome)
            if outcome.id in EXPLAINING:
                explained = case.explained | {*outcome.layers}
                if outcome.id == "low-precision":  # what follows is given rounding errors
                    names = [one.layer.name for one in measured.layers]
                    explained |= {*names[names.index(outcome.layers[0]) :]}
                    missing = f"layers that do not follow {outcome.layers[0]}"
                    not_checked.append(NotChecked("stale by fit", missing))
                case = dataclasses.replace(case, explained=explained)
    if network.labels is None:
        not_checked.append(NotChecked("loss and accuracy", "labels in the batches"))
    rows = tuple(_row(one, run) for one in measured.layers)
    evaluation = _evaluation(network, measured)
    return Findings(tuple(outcomes), tuple(not_checked), rows, evaluation, network.examples)


def _evaluation(network: Network, measured: Measured) -> dict[str, dict[str, float]]:
    precise = network.logits(measured.precise, "precise statistics")
    logits = {
        "stored": network.logits(network.batch_stats, "stored statistics"),
        "precise": precise,
        "batch": measured.batch_logits,
    }
    return {
        name: network.means(of) | {"moved": distance(precise, of)} for name, of in logits.items()
    }


def _row(one: Evidence, run: Run) -> Row:
    drift, log_ratio = one.drift, one.log_ratio
    return Row(
        name=one.layer.name,
        shape=tuple(one.shape),
        drift=rms(drift),
        log_ratio=float(log_ratio.mean()) if log_ratio.size else None,
        noise=noise_of(one, run.batch_size),
        shift=float(checks.shifts(one).mean()) if one.random else None,
        dead=int((~one.live).sum()),
        count=count_of(one, run.batch_size),
        drifts=_quantiles(drift),
        log_ratios=_quantiles(log_ratio),
    )


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    return tuple(map(float, np.quantile(values, QUANTILES))) if values.size else ()
