"""Where healthy ends: every number that the audit compares with, and where it comes from."""

import math
from typing import NamedTuple


class Limit(NamedTuple):
    """A number, what it is of, and where it comes from."""

    value: float
    of: str
    source: str


LIMITS = {
    "initial_share": Limit(
        0.01,
        "momentum ** updates, the share of the starting values 0 and 1 in the averages",
        "one per cent of what evaluation uses; what is warned of before training starts, too",
    ),
    "initial_shift": Limit(
        0.1,
        "that share times |mean| / std, by which evaluation's mean is off, RMS over the channels",
        "a tolerance: what the norm returns moves by a tenth of its standard deviation",
    ),
    "standard_errors": Limit(
        4.0,
        "RMS over the channels of stored minus expected statistics, in standard errors",
        "normal distribution: 6e-5 of the healthy layers are beyond it even if all channels of a "
        "layer move as one, so that one network of 100 norms in 80 has a false alarm. The standard "
        "error is sqrt(s^2 ((1-m)/(1+m) A/B + 1/k)): s^2 the variance between k audited batches of "
        "A examples, B the examples of a training batch, m the momentum",
    ),
    "moved": Limit(
        0.1,
        "total variation distance between the predictions under stored and expected statistics",
        "a tolerance: the probability of an answer moves by no more than a tenth. The distance "
        "also has to be above that which normalising by the batch makes, the noise that the "
        "network was trained under",
    ),
    "misfit_mean": Limit(
        0.25,
        "RMS over the channels of stored minus expected mean, in standard deviations",
        "the statistics are worse than those of one batch of 16 independent values (see noise)",
    ),
    "misfit_var": Limit(
        math.sqrt(2 / 16),
        "RMS over the channels of the log of stored over expected variance",
        "likewise: the log variance of n normal values has a standard deviation of sqrt(2 / n)",
    ),
    "explained": Limit(
        0.5,
        "R^2 of the fit stored = share * initial + (1 - share) * expected, over all channels",
        "the starting values explain more of the difference than everything else together",
    ),
    "noise": Limit(
        0.25,
        "standard deviation of a training batch's mean, in standard deviations of the values",
        "1 / sqrt(16), that of 16 independent values; below 16 examples batch norm loses accuracy "
        "(Wu & He, 2018, figure 1)",
    ),
    "shift": Limit(
        0.1,
        "absolute log of the ratio of variances in training and in evaluation",
        "a tolerance: what the norm returns is scaled by 5 % too much or too little",
    ),
    "dead": Limit(
        2.0**-8,
        "standard deviation of what a channel returns, relative to the layer's RMS",
        "half a unit in the last place of bfloat16: added to the others it is lost there",
    ),
    "channels": Limit(
        0.1,
        "share of a layer's channels that may be dead or have a variance below epsilon",
        "a tolerance: networks with ReLU have some units that are never active",
    ),
    "rounding": Limit(
        0.01,
        "rounding error of a variance, relative to it",
        "arithmetic: (mean / std)^2 eps for E[x^2] - E[x]^2, and (mean / std)^2 eps^2 / 12 for "
        "values that were rounded before",
    ),
    "digits": Limit(
        0.5,
        "power of the precision's eps, relative to the largest logit, by which logits may differ",
        "rounding leaves more than half of the digits as they are; other statistics do not",
    ),
    "replicas": Limit(
        1e-4,
        "difference of replicas' statistics, in standard deviations, or of log variances",
        "float32 sums over up to 1,000 values in another order differ by 1,000 * 2^-24",
    ),
}


def limit(name: str) -> float:
    """Returns the number of that name in `LIMITS`."""
    return LIMITS[name].value
