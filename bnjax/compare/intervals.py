"""Computes means, differences, ratios and medians over a few runs, with 95 % intervals."""

import dataclasses
import math
import warnings
from collections.abc import Sequence

import numpy as np
from scipy import special, stats

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    An unbounded end of the interval is infinite; for a time or ratio, an unbounded lower end is 0.

    Attributes:
        value: the estimate; infinite for a median if too few runs reached the goal.
        low, high: the ends of the interval.
        n: the number of runs or pairs of runs.
        method: the method in words, for a footnote.
        bound: "at least" or "at most" if the value is only a bound, "unknown" if it is
            meaningless, otherwise empty.
    """

    value: float
    low: float
    high: float
    n: int
    method: str
    bound: str = ""

    def __str__(self) -> str:
        """Returns the value with its interval; an unbounded end is shown as dots.

        >>> print(mean([1.0, 2.0, 3.0]))
        2 [-0.4841 to 4.484]
        >>> print(ratio(Times((400, 400), (False, False)), Times((70, 80), (True, True))))
        at least 5.345 [2.288 to …]
        """
        if self.bound == "unknown":
            return self.bound
        low, high = ("…" if math.isinf(end) else f"{end:.4g}" for end in (self.low, self.high))
        value = f"{self.bound} {self.value:.4g}".strip()
        if math.isinf(self.value):
            value = "not reached by half the runs"
        if high == "…" and self.low in (0, -math.inf):
            return value
        return f"{value} [{low} to {high}]"


@dataclasses.dataclass(frozen=True)
class Times:
    """One or more right-censored times, each above 0.

    `reached[i]` is False if run i ended at time `values[i]` without reaching the goal.
    """

    values: tuple[int | float, ...]
    reached: tuple[bool, ...]

    def _censored(self) -> stats.CensoredData:
        return stats.CensoredData.right_censored(self.values, ~np.array(self.reached))


def mean(values: Sequence[float]) -> Estimate:
    """Returns the mean with Student's t interval, which is infinite for a single value.

    >>> found = mean([1.0, 2.0, 3.0])
    >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
    (2.0, -0.484, 4.484)
    """
    n, centre = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(centre, -math.inf, math.inf, n, "one run, no interval")
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return Estimate(centre, centre - half, centre + half, n, "mean, t interval")


def mean_accuracy(values: Sequence[float]) -> Estimate:
    """Returns the mean of accuracies (0 to 1) with a t interval on the logit scale.

    Let m be the mean, s its standard error, and t Student's t for n - 1 degrees of freedom. The
    ends are expit(logit(m) ± t s / (m (1 - m))), as in R's `survey::svyciprop` with
    `method="xlogit"`. If m is 0 or 1, all values are equal and the interval has width 0.

    >>> print(mean_accuracy([0.88, 0.91, 0.97]))
    0.92 [0.7101 to 0.9818]
    """
    plain = mean(values)
    centre = plain.value
    if plain.n < 2 or centre in (0, 1):
        return plain
    half = (plain.high - centre) / (centre * (1 - centre))
    low, high = map(float, special.expit(special.logit(centre) + np.array([-half, half])))
    return Estimate(centre, low, high, plain.n, "mean, t interval on the logit scale")


def difference(of: Sequence[float], against: Sequence[float]) -> Estimate:
    """Returns the mean of the paired differences `of - against` with its t interval."""
    found = mean([a - b for a, b in zip(of, against, strict=True)])
    if found.n < 2:
        return found
    return dataclasses.replace(found, method="mean of the differences at equal seeds, t interval")


def ratio(of: Times, against: Times) -> Estimate:
    """Returns the geometric mean of the paired ratios `of / against` with its t interval.

    The interval is computed on the logarithms. A run that did not reach the goal is counted at
    the time at which it ended. If only `of` has such runs, their ratios are too small: the value is
    a lower bound, the lower end a confidence bound, and the upper end infinite. If only `against`
    has such runs, the reverse holds. If both have such runs, the ratio is unknown.

    >>> found = ratio(Times((400, 400), (False, False)), Times((70, 80), (True, True)))
    >>> round(found.value, 2), round(found.low, 2), found.high
    (5.35, 2.29, inf)
    """
    logs = mean([math.log(a / b) for a, b in zip(of.values, against.values, strict=True)])
    value, low, high = (math.exp(end) for end in (logs.value, logs.low, logs.high))
    bound = {(True, True): "", (False, True): "at least", (True, False): "at most"}.get(
        (all(of.reached), all(against.reached)), "unknown"
    )
    low, high = low if all(against.reached) else 0.0, high if all(of.reached) else math.inf
    method = "geometric mean of the ratios at equal seeds, t interval of their logarithms"
    if bound:
        method += ", a bound if some runs did not reach the goal"
    return Estimate(value, low, high, logs.n, method, bound)


def median(times: Times) -> Estimate:
    """Returns the Kaplan-Meier median with its interval.

    The median is infinite if more than half of the runs do not reach the goal. The confidence
    interval (Brookmeyer & Crowley, 1982) consists of the times at which the log-log confidence
    interval of the survival function, with Greenwood's variance, includes 1/2. With few runs the
    upper end is often infinite; with three runs the coverage is only 88 %.
    """
    curve = stats.ecdf(times._censored()).sf
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        # SciPy divides by 0 if all runs or no run reached the goal; the NaNs are replaced below.
        warnings.simplefilter("ignore", RuntimeWarning)
        ends = curve.confidence_interval(LEVEL, method="log-log")
    low, high = ends.low.probabilities, ends.high.probabilities

    def first_half(probabilities: np.ndarray) -> float:
        below = np.flatnonzero(probabilities <= 0.5 + 1e-9)
        return float(curve.quantiles[below[0]]) if below.size else math.inf

    value, n = first_half(curve.probabilities), len(times.values)
    if n < 2:
        return Estimate(value, 0.0, math.inf, n, "one run, no interval")
    first = first_half(np.where(np.isnan(low), curve.probabilities, low))
    last = first_half(np.where(np.isnan(high), 1.0, high))
    # The true lower end may be later than the longest run.
    known = float(max(times.values)) if any(times.reached) else 0.0
    return Estimate(value, min(first, known), last, n, "Kaplan-Meier median, log-log interval")


def logrank(of: Times, against: Times) -> float:
    """Returns the p value of the unpaired log-rank test of the hypothesis that times are equal.

    Returns 1 if the runs give no information: if no run reached the goal, or all runs of one
    variant ended before the first run of the other reached it.
    """
    if not any((*of.reached, *against.reached)):
        return 1.0
    with np.errstate(invalid="ignore"):  # 0 / 0 without information
        found = float(stats.logrank(of._censored(), against._censored()).pvalue)
    return 1.0 if math.isnan(found) else found
