"""Whether stored statistics are those of these weights: converged, and not stale."""

import math

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax.clinic.case import Case, Outcome, momentum_of, rms
from bnjax.clinic.evidence import Evidence, distance
from bnjax.clinic.findings import Finding, NotChecked
from bnjax.clinic.limits import limit
from bnjax.types import fingerprint

FLOAT32 = 1e-6  # of two statistics that agree but for rounding


def unfinished_or_stale(case: Case) -> Outcome:
    """Finds averages that are not ready, or not of these weights; one of the two at most."""
    open_layers = [one for one in case.layers if one.layer.name not in case.explained]
    known = [(one, _initial_share(case, one)) for one in open_layers]
    early = [(one, share) for one, share in known if _is_early(one, share)]
    if early:
        yield _not_converged(early, "momentum ** updates is", _updates(case, early[0][0]))
        yield NotChecked("stale", "averages that have converged")
        return
    if case.run.weights is None:
        missing = "the fingerprint of the weights that the statistics belong to: Run(weights=…)"
        yield NotChecked("stale by fingerprint", missing)
    elif case.run.weights != (mine := fingerprint(case.network.params)):
        text = f"the statistics belong to weights {case.run.weights}, and these are {mine}"
        yield Finding("stale", tuple(one.layer.name for one in open_layers), text)
        return
    if several := [one for one in open_layers if one.calls > 1]:
        names = ", ".join(f"{one.layer.name} ({one.calls} calls a pass)" for one in several)
        yield NotChecked(
            "stale by fit", f"norms that are called once; their averages mix their calls: {names}"
        )
    judged = [one for one in open_layers if one.calls == 1]
    if case.batches < 2:
        yield NotChecked("stale by fit", "a second batch, to see how much batches differ")
        return
    if case.run.steps is None and any(isinstance(momentum_of(one), float) for one in open_layers):
        missing = "the number of updates: Run(steps=…); judged by how the averages look"
        yield NotChecked("not-converged by its updates", missing)
    beyond = [one for one in judged if max(z_scores(case, one)) > limit("standard_errors")]
    if beyond:
        yield from _of_poor_fit(case, judged, beyond)


def z_scores(case: Case, evidence: Evidence) -> tuple[float, float]:
    """Returns stored minus expected mean and log variance, in standard errors, RMS over channels.

    Exponential averages of independent values of variance s^2 have (1-m) / (1+m) s^2. What is
    expected is the mean of k batches, and has s^2 / k.
    """
    given, size = evidence.train, case.run.batch_size or evidence.examples
    momentum = momentum_of(evidence)
    left = 1.0 if callable(momentum) else 0.0
    if isinstance(momentum, int | float):
        left = (1 - momentum) / (1 + momentum)
    factor = left * evidence.examples / size + 1 / len(given.mean)
    std, live = evidence.std, evidence.live
    of_mean = rms((given.mean.std(0, ddof=1) / std)[live]) * math.sqrt(factor)
    of_var = rms((given.var.std(0, ddof=1) / std**2)[live]) * math.sqrt(factor)
    return (
        rms(evidence.drift) / max(of_mean, FLOAT32),
        rms(evidence.log_ratio) / max(of_var, FLOAT32),
    )


def _of_poor_fit(case: Case, judged: list[Evidence], beyond: list[Evidence]) -> Outcome:
    """Finds statistics that are worse than a small batch's, or whose misfit predictions show."""
    network, expected = case.network, case.measured.expected
    mixed, stored = flatten_dict(dict(expected)), flatten_dict(dict(network.batch_stats))
    for one in judged:
        for name in ("mean", "var"):
            mixed[*one.layer.path, name] = stored[*one.layer.path, name]
    right = network.logits(expected, "expected statistics")
    moved = distance(right, network.logits(unflatten_dict(mixed), "those of them that are judged"))
    # What a batch's noise does to the predictions goes as the noise does, 1 / sqrt(examples).
    scale = judged[0].examples / (case.run.batch_size or judged[0].examples)
    usual = distance(right, case.measured.batch_logits) * math.sqrt(scale)
    misfit = any(
        rms(one.drift) > limit("misfit_mean") or rms(one.log_ratio) > limit("misfit_var")
        for one in beyond
    )
    if not misfit and moved <= max(limit("moved"), usual):
        return
    share, explained = fitted_share(judged)
    if explained > limit("explained") and any(_is_early(one, share) for one in judged):
        yield _not_converged([(one, share) for one in judged], "they fit best for", None)
        return
    worst = max(beyond, key=lambda one: max(z_scores(case, one)))
    cause = (
        "their fingerprint is right, so the weights move faster than the averages follow"
        if case.run.weights is not None
        else "averaged or restored weights, or weights that move faster than averages follow"
    )
    text = (
        f"up to {max(z_scores(case, worst)):.0f} standard errors from what these weights produce "
        f"(in {worst.layer.name}: means by {rms(worst.drift):.2f} standard deviations, log "
        f"variances by {rms(worst.log_ratio):.2f}); {moved:.0%} of the predicted probability "
        f"moves by it, {usual:.0%} by a batch's own statistics: {cause}"
    )
    yield Finding("stale", tuple(one.layer.name for one in beyond), text)


def fitted_share(layers: list[Evidence]) -> tuple[float, float]:
    """Returns the share of the starting values that fits best, and the R^2 of that fit.

    Least squares over all channels of stored = share * (0, 1) + (1 - share) * expected, means in
    standard deviations and variances in squares of them.
    """
    x, y = [], []
    for one in layers:
        mean, var, std = one.train.mean.mean(0), one.train.var.mean(0), one.std
        x += [(-mean / std)[one.live], ((1 - var) / std**2)[one.live]]
        y += [((one.mean - mean) / std)[one.live], ((one.var - var) / std**2)[one.live]]
    initial, found = np.concatenate(x), np.concatenate(y)
    share = float(initial @ found / max(initial @ initial, 1e-12))
    rest = found - share * initial
    return share, 1 - float(rest @ rest / max(found @ found, 1e-12))


def _updates(case: Case, evidence: Evidence) -> int | None:
    """Returns how often the averages of a norm were updated, if it is known."""
    stored = flatten_dict(dict(case.network.batch_stats))
    if (*evidence.layer.path, "count") in stored:
        return int(np.min(stored[*evidence.layer.path, "count"]))
    return None if case.run.steps is None else case.run.steps * evidence.calls


def _initial_share(case: Case, evidence: Evidence) -> float:
    """Returns which share of the averages is still 0 and 1; 0 if that is not known."""
    momentum, updates = momentum_of(evidence), _updates(case, evidence)
    if updates is None or getattr(evidence.layer.module, "debias", False):
        return 0.0
    return float(momentum) ** updates if isinstance(momentum, int | float) else 0.0


def _is_early(evidence: Evidence, share: float) -> bool:
    """Returns whether so much of the starting values is still too much."""
    apart = rms((evidence.train.mean.mean(0) / evidence.std)[evidence.live])
    return share > limit("initial_share") or share * apart > limit("initial_shift")


def _not_converged(shares: list[tuple[Evidence, float]], how: str, updates: int | None) -> Finding:
    worst, share = max(shares, key=lambda pair: pair[1])
    momentum, text = momentum_of(worst), f"{how} a share of {share:.1%} of the starting values"
    if isinstance(momentum, int | float) and 0 < momentum < 1:
        needed = math.ceil(math.log(limit("initial_share")) / math.log(momentum))
        after = "" if updates is None else f" after {updates:,} updates"
        text += (
            f"{after} with momentum {momentum:g}; it takes {needed:,} updates to get to "
            f"{limit('initial_share'):.0%}"
        )
    apart = rms((worst.train.mean.mean(0) / worst.std)[worst.live])
    if share * apart > limit("initial_shift"):
        text += (
            f"; the mean of {worst.layer.name} is {apart:.3g} standard deviations from 0, so that "
            f"this moves it by {share * apart:.2f}"
        )
    return Finding("not-converged", tuple(one.layer.name for one, _ in shares), text)
