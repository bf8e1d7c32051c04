"""Intervals and censored times against textbook examples and closed forms."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from bnjax.compare.intervals import Times, difference, logrank, mean, median, ratio, survival

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


def test_the_t_interval_of_students_own_example():
    """Hours of sleep gained with the second drug, minus the first, in ten patients.

    Student (1908): t = 4.06, 95 % from 0.70 to 2.46.
    """
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = difference(second, first)
    assert found.value == pytest.approx(1.58)
    assert (found.low, found.high) == pytest.approx((0.70, 2.46), abs=0.005)
    assert found.n == 10


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_the_t_interval_holds_the_means_that_a_t_test_does_not_reject(values):
    found = mean(values)
    if np.std(values) > 1e-6:
        for end in (found.low, found.high):
            assert stats.ttest_1samp(values, end).pvalue == pytest.approx(0.05, abs=1e-6)
    else:
        assert found.high - found.low < 1e-4


def test_one_run_has_no_interval():
    assert (mean([3.0]).low, mean([3.0]).high) == (-math.inf, math.inf)
    one = Times((3,), (True,))
    for found in (median(one), ratio(one, one)):
        assert (found.low, found.high) == (0, math.inf)
    assert ratio(one, one).value == 1


def test_equal_values_have_an_interval_of_no_width():
    found = mean([0.1, 0.1, 0.1])
    assert found.low == pytest.approx(found.high) == pytest.approx(0.1)


def test_kaplan_meier_of_the_textbook():
    at = dict(zip(*map(np.ndarray.tolist, survival(TREATED)), strict=True))
    published = {6: 0.857, 7: 0.807, 10: 0.753, 13: 0.690, 16: 0.627, 22: 0.538, 23: 0.448}
    for week, fraction in published.items():
        assert at[week] == pytest.approx(fraction, abs=5e-4)
    assert at[35] == at[23]  # nobody relapsed after that
    assert median(TREATED).value == 23
    assert median(PLACEBO).value == 8


def loglog_interval(times):
    """The interval of the median by hand: Greenwood's sum, week by week."""
    values, reached = np.array(times.values), np.array(times.reached)
    alive, greenwood, found = 1.0, 0.0, []
    for week in sorted({*values[reached]}):
        at_risk, events = np.sum(values >= week), np.sum(values[reached] == week)
        alive *= 1 - events / at_risk
        if alive > 0:
            greenwood += events / (at_risk * (at_risk - events))
            spread = 1.959964 * math.sqrt(greenwood) / abs(math.log(alive))
            found.append((week, alive ** math.exp(spread), alive ** math.exp(-spread)))
    return tuple(next((week for week, *ends in found if ends[i] <= 0.5), math.inf) for i in (0, 1))


@pytest.mark.parametrize("times", [TREATED, PLACEBO], ids=["treated", "placebo"])
def test_the_medians_interval_is_the_log_log_one(times):
    assert (median(times).low, median(times).high) == loglog_interval(times)


def test_the_medians_interval_as_published():
    """R's survfit with conf.type = "log-log" gives 13 to none, and 4 to 11."""
    assert (median(TREATED).low, median(TREATED).high) == (13, math.inf)
    assert (median(PLACEBO).low, median(PLACEBO).high) == (4, 11)


def test_the_log_rank_test_of_the_textbook():
    assert logrank(TREATED, PLACEBO) == pytest.approx(stats.chi2.sf(16.79, 1), rel=5e-3)
    never = Times((5, 5), (False, False))
    assert logrank(never, never) == 1


def test_times_that_half_the_runs_never_reach_have_no_median():
    found = median(Times((40, 100, 100), (True, False, False)))
    assert found.value == math.inf
    assert found.high == math.inf
    never = median(Times((100, 100, 100), (False,) * 3))
    assert (never.value, never.low, never.high) == (math.inf, 0, math.inf)
    late = median(Times((40,) + (100,) * 99, (True,) + (False,) * 99))
    assert (late.value, late.low, late.high) == (
        math.inf,
        100,
        math.inf,
    )  # surely later than anybody saw


def test_the_ratio_is_paired_and_on_the_log_scale():
    found = ratio(Times((200, 400, 800), (True,) * 3), Times((100, 200, 400), (True,) * 3))
    assert (found.value, found.low, found.high) == pytest.approx(
        (2, 2, 2)
    )  # unpaired it would be wide
    other = ratio(Times((300, 400), (True,) * 2), Times((100, 100), (True,) * 2))
    half = (
        12.7062 * abs(math.log(4 / 3)) / 2
    )  # t of one degree of freedom; the standard error of two is half their distance
    assert math.log(other.high / other.value) == pytest.approx(half, rel=1e-4)
    assert other.value == pytest.approx(math.sqrt(12))


def test_censored_ratios_are_bounds():
    true, others = (300, 400, 500, 350), Times((100, 110, 90, 105), (True,) * 4)
    whole = ratio(Times(true, (True,) * 4), others)
    cut = Times(tuple(min(steps, 360) for steps in true), tuple(steps <= 360 for steps in true))
    lower = ratio(cut, others)
    assert lower.high == math.inf
    assert lower.value < whole.value
    assert lower.bound == "at least"
    upper = ratio(others, cut)
    assert upper.low == 0
    assert upper.high == pytest.approx(1 / lower.low)
    assert upper.bound == "at most"
    both = ratio(cut, cut)
    assert (both.low, both.high, str(both)) == (0, math.inf, "unknown")


def test_a_test_without_information_has_a_p_value_of_1():
    never, later = Times((20, 20, 20), (False,) * 3), Times((60, 70, 80), (True,) * 3)
    assert logrank(never, later) == 1  # at 60 nobody of the first arm is left to compare with
    assert logrank(never, never) == 1


@pytest.mark.parametrize(
    ("values", "reached"), [((), ()), ((1, 2), (True,)), ((0,), (True,)), ((math.inf,), (False,))]
)
def test_what_are_no_times_is_refused(values, reached):
    with pytest.raises(ValueError, match="are not times"):
        Times(values, reached)


def test_intervals_and_claims_need_no_jax():
    code = (
        "import sys, bnjax.compare.intervals, bnjax.compare.claims, bnjax.compare.text\n"
        "print(sorted({'jax', 'flax', 'optax', 'orbax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
