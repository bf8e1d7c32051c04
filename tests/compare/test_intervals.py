"""Intervals and censored times against textbook examples and closed forms."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bnjax.compare.intervals import Times, difference, logrank, mean, mean_accuracy, median, ratio

# Weeks of remission of 42 children with leukaemia, 6-mercaptopurine against placebo: Freireich et
# al. (1963), the standard example of survival analysis (for instance Collett, Modelling Survival
# Data; Kleinbaum & Klein, table 2.1).
TREATED = Times(
    (6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35),
    tuple(map(bool, (1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0))),
)
PLACEBO = Times(
    (1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23), (True,) * 21
)


def never(*values):
    return Times(values, (False,) * len(values))


def always(*values):
    return Times(values, (True,) * len(values))


def test_the_t_interval_of_students_own_example():
    """Hours of sleep gained with the second drug, minus the first, in ten patients.

    Student (1908): t = 4.06, 95 % from 0.70 to 2.46.
    """
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = difference(second, first)
    assert (found.value, found.low, found.high) == pytest.approx((1.58, 0.70, 2.46), abs=0.005)
    assert found.n == 10


def test_the_interval_of_an_accuracy_by_hand():
    """The logit with its standard error by the delta method: d logit(p) / dp = 1 / (p (1 - p))."""
    found = mean_accuracy([0.99, 0.80, 0.97])
    assert mean([0.99, 0.80, 0.97]).high > 1.08
    p = (0.99 + 0.80 + 0.97) / 3
    error = math.sqrt(sum((x - p) ** 2 for x in (0.99, 0.80, 0.97)) / 2 / 3) / (p * (1 - p))
    for t, end in ((-4.302653, found.low), (4.302653, found.high)):  # two degrees of freedom
        odds = p / (1 - p) * math.exp(t * error)
        assert end == pytest.approx(odds / (1 + odds), rel=1e-4)


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=9))
def test_the_interval_of_an_accuracy_stays_within_0_and_1(correct):
    accuracies = [n / 10_000 for n in correct]
    found, plain = mean_accuracy(accuracies), mean(accuracies)
    assert 0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1
    assert found.value == plain.value
    if plain.high - plain.low < 0.01 and 0.1 < plain.value < 0.9:  # a narrow one is Student's own
        assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=3e-4)


def test_one_run_has_no_interval_and_equal_values_one_of_no_width():
    for found in (mean([3.0]), mean_accuracy([0.3])):
        assert (found.low, found.high) == (-math.inf, math.inf)
    one = always(3)
    for found in (median(one), ratio(one, one)):
        assert (found.low, found.high) == (0, math.inf)
    assert ratio(one, one).value == 1
    for value in (0.0, 0.1, 1.0):
        for found in (mean([value] * 3), mean_accuracy([value] * 3)):
            assert (found.low, found.high) == pytest.approx((value, value))


@pytest.mark.parametrize(
    ("times", "middle", "published"),
    [(TREATED, 23, (13, math.inf)), (PLACEBO, 8, (4, 11))],
    ids=["treated", "placebo"],
)
def test_the_median_and_its_log_log_interval_as_published(times, middle, published):
    """R's survfit with conf.type = "log-log"."""
    found = median(times)
    assert found.value == middle
    assert (found.low, found.high) == published


def test_the_log_rank_test_of_the_textbook():
    assert logrank(TREATED, PLACEBO) == pytest.approx(stats.chi2.sf(16.79, 1), rel=5e-3)
    assert logrank(never(5, 5), never(5, 5)) == 1
    # At 60 nobody of the first arm is left to compare with.
    assert logrank(never(20, 20, 20), always(60, 70, 80)) == 1


def test_times_that_half_the_runs_never_reach_have_no_median():
    few = Times((40, 100, 100), (True, False, False))
    fewer = Times((40,) + (100,) * 99, (True,) + (False,) * 99)  # later than anybody saw
    for times, low in ((few, 40), (never(100, 100, 100), 0), (fewer, 100)):
        found = median(times)
        assert (found.value, found.low, found.high) == (math.inf, low, math.inf)
    assert median(Times((1, 2, 3, 4), (True, True, False, False))).value == 2  # just half of them


def test_the_ratio_is_paired_and_on_the_log_scale():
    found = ratio(always(200, 400, 800), always(100, 200, 400))  # unpaired it would be wide
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    other = ratio(always(300, 400), always(100, 100))
    # t of one degree of freedom; the standard error of two is half their distance.
    half = 12.7062 * abs(math.log(4 / 3)) / 2
    assert math.log(other.high / other.value) == pytest.approx(half, rel=1e-4)
    assert other.value == pytest.approx(math.sqrt(12))


def test_censored_ratios_are_bounds():
    true, others = (300, 400, 500, 350), always(100, 110, 90, 105)
    cut = Times(tuple(min(steps, 360) for steps in true), tuple(steps <= 360 for steps in true))
    lower, upper, both = ratio(cut, others), ratio(others, cut), ratio(cut, cut)
    assert (lower.high, lower.bound) == (math.inf, "at least")
    assert lower.value < ratio(always(*true), others).value
    assert (upper.low, upper.bound) == (0, "at most")
    assert upper.high == pytest.approx(1 / lower.low)
    assert (both.low, both.high, str(both)) == (0, math.inf, "unknown")


@pytest.mark.slow
def test_intervals_claims_and_reports_need_no_jax():
    code = (
        "import sys, bnjax.compare.claims, bnjax.compare.report\n"
        "print(sorted({'jax', 'flax', 'optax', 'orbax', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
