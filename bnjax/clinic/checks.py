"""What is wrong with one norm by itself: its stored values, its channels, its arithmetic."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from bnjax.clinic.case import Case, Outcome, count_of, noise_of
from bnjax.clinic.evidence import Evidence
from bnjax.clinic.findings import Finding, NotChecked
from bnjax.clinic.limits import limit


def never_updated(case: Case) -> Outcome:
    """Finds averages that are exactly what they begin with."""
    names = [one.layer.name for one in case.layers if not one.mean.any() and (one.var == 1).all()]
    if names:
        text = f"mean 0 and variance 1 exactly, in {len(names)} of {len(case.layers)} norms"
        yield Finding("never-updated", tuple(names), text)


def invalid_statistics(case: Case) -> Outcome:
    """Finds what no average of means and variances can be, and norms that are given no numbers."""
    names, words = [], []
    for one in case.layers:
        finite = np.isfinite(one.mean) & np.isfinite(one.var)
        negative = finite & (one.var < 0)
        zero = finite & (one.var == 0) & (one.train.var.mean(0) > 0)
        counts = {"not finite": finite.size - finite.sum(), "negative": negative.sum()}
        counts["0 where the data vary"] = zero.sum()
        counts["given what is not finite"] = (~_given(one)).sum()
        if said := [f"{count} {word}" for word, count in counts.items() if count]:
            names.append(one.layer.name)
            words.append(f"{', '.join(said)} of {one.mean.size}")
    if names:
        yield Finding("invalid-statistics", tuple(names), "; ".join(words[:6]))


def dead_channels(case: Case) -> Outcome:
    """Finds layers many of whose channels return constants."""
    names, words = [], []
    for one in case.layers:
        dead = ~one.live & _given(one).all()  # what is not finite is another illness
        if dead.mean() > limit("channels"):
            names.append(one.layer.name)
            by_scale = int((dead & (np.abs(one.scale) <= limit("dead"))).sum())
            words.append(f"{dead.sum()} of {dead.size} channels, {by_scale} by their scale")
    if names:
        yield Finding("dead-channels", tuple(names), "; ".join(words[:6]))


def _given(one: Evidence) -> np.ndarray:
    """Returns which channels are given numbers, bool [c]."""
    return np.isfinite(one.batch.mean + one.batch.var).all(0)


def epsilon_large(case: Case) -> Outcome:
    """Finds layers whose epsilon, and not whose variance, decides what they divide by."""
    names, words = [], []
    for one in case.layers:
        epsilon, var = one.layer.module.epsilon, one.batch.var.mean(0)[one.live]
        below = var < epsilon
        if below.size and below.mean() > limit("channels"):
            names.append(one.layer.name)
            words.append(
                f"{below.sum()} of {var.size} channels have a variance below epsilon = "
                f"{epsilon:.3g}, the median is {np.median(var):.3g}"
            )
    if names:
        yield Finding("epsilon-large", tuple(names), "; ".join(words[:6]))


def low_precision(case: Case) -> Outcome:
    """Finds variances that rounding drowns, and statistics too coarse to be averaged in."""
    names, words = [], []
    for one in case.layers:
        ratio = float((np.abs(one.train.mean.mean(0)) / one.std)[one.live].max(initial=0))
        error, how = max(_rounding(one, ratio))
        coarse = jnp.finfo(one.dtype).bits < 32
        if error > limit("rounding") or coarse:
            names.append(one.layer.name)
            said = f"|mean| / std up to {ratio:.3g}, {how}: the variance is {error:.1%} rounding"
            words.append(f"averages kept in {jnp.dtype(one.dtype).name}" if coarse else said)
    if names:
        yield Finding("low-precision", tuple(names), "; ".join(words[:6]))


def _rounding(one: Evidence, ratio: float) -> list[tuple[float, str]]:
    """Returns the relative errors of the variance, and where they come from."""
    dtype = jnp.dtype(one.layer.dtype)
    ulp = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.floating) else 0.0
    errors = [(ratio**2 * ulp**2 / 12, f"given in {dtype.name}")]
    module = one.layer.module
    if isinstance(module, nn.BatchNorm) and module.use_fast_variance:
        dtype = jnp.promote_types(dtype, jnp.float32) if module.force_float32_reductions else dtype
        error = ratio**2 * float(jnp.finfo(dtype).eps)
        errors.append((error, f"E[x^2] - E[x]^2 in {dtype.name}"))
    return errors


def small_batch(case: Case) -> Outcome:
    """Finds layers whose batch statistics are mostly chance."""
    if case.run.batch_size is None:
        missing = "how many examples share their statistics in training: Run(batch_size=…)"
        yield NotChecked("small-batch", missing)
        return
    if case.batches < 2:
        yield NotChecked("small-batch", "a second batch, to see how much batches differ")
        return
    names, words = [], []
    for one in case.layers:
        noise = noise_of(one, case.run.batch_size)
        if noise is not None and noise > limit("noise"):
            names.append(one.layer.name)
            n = count_of(one, case.run.batch_size)
            words.append(
                f"a batch's mean varies by {noise:.2f} standard deviations, as that of "
                f"{noise**-2:.0f} independent values (n = {n:,})"
            )
    if names:
        yield Finding("small-batch", tuple(names), "; ".join(words[:6]))


def variance_shift(case: Case) -> Outcome:
    """Finds norms whose inputs have another variance while units are dropped."""
    if not any(one.random for one in case.layers):
        return
    if case.batches < 2:
        yield NotChecked("variance-shift", "a second batch, to see how much chance is in it")
        return
    names, words = [], []
    for one in case.layers:
        ratios = shifts(one)
        error = ratios.std(ddof=1) / len(ratios) ** 0.5
        shift = abs(ratios.mean())
        if one.random and shift > limit("shift") and shift > limit("standard_errors") * error:
            names.append(one.layer.name)
            words.append(f"{np.exp(ratios.mean()):.3f}")
    if names:
        text = f"variance in training / in evaluation: {', '.join(words)}"
        yield Finding("variance-shift", tuple(names), text)


def shifts(evidence: Evidence) -> np.ndarray:
    """Returns the mean log ratio of variances with and without dropped units, of each batch."""
    epsilon, alive = evidence.layer.module.epsilon, evidence.live
    logs = np.log((evidence.train.var + epsilon) / (evidence.batch.var + epsilon))
    return logs[:, alive].mean(1) if alive.any() else np.zeros(len(logs))
