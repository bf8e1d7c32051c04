"""One norm folded into one layer, against the two by hand in float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnjax.clinic.folding import fold_pair


def conv(x, kernel, bias, groups):
    """A convolution [n, h, w, c] without padding, position by position and group by group."""
    height, width, _, outputs = kernel.shape
    inputs, each = kernel.shape[2], outputs // groups
    y = np.zeros((len(x), x.shape[1] - height + 1, x.shape[2] - width + 1, outputs))
    for i, j, group in np.ndindex(y.shape[1], y.shape[2], groups):
        patch = x[:, i : i + height, j : j + width, group * inputs : (group + 1) * inputs]
        own = slice(group * each, (group + 1) * each)
        y[:, i, j, own] = np.tensordot(patch, kernel[..., own], 3)
    return y if bias is None else y + bias


def normalised(x, scale, shift, mean, var, epsilon):
    y = (x - mean) / np.sqrt(var + epsilon)
    y = y if scale is None else y * scale
    return y if shift is None else y + shift


def norm_of(rng, channels, has_scale=True, has_shift=True):
    """Scales of both signs, and means that are not small against the deviations."""
    return (
        rng.normal(0, 1, channels) if has_scale else None,
        rng.normal(0, 2, channels) if has_shift else None,
        rng.normal(0, 3, channels),
        rng.uniform(0, 2, channels),
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    sides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    place=st.sampled_from(["after", "before"]),
    has=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_convolutions_of_any_groups(seed, sides, groups, inputs, outputs, place, has):
    rng = np.random.default_rng(seed)
    has_bias, *has_affine = has
    kernel = rng.normal(size=(*sides, inputs, groups * outputs))
    bias = rng.normal(size=groups * outputs) if has_bias else None
    norm = norm_of(rng, groups * (outputs if place == "after" else inputs), *has_affine)
    x = rng.normal(1, 2, (2, 4, 3, groups * inputs))
    if place == "after":
        wanted = normalised(conv(x, kernel, bias, groups), *norm, 0.1)
    else:
        wanted = conv(normalised(x, *norm, 0.1), kernel, bias, groups)
    kernel, bias = fold_pair(kernel, bias, *norm, 0.1, norm=place, groups=groups)
    # Of what is summed, gain times mean is the largest, at most about 100.
    np.testing.assert_allclose(conv(x, kernel, bias, groups), wanted, rtol=1e-11, atol=1e-11)


def test_float32_is_folded_in_float64_and_returned_as_float32():
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(2000, 4)).astype(np.float32)
    norm = [leaf.astype(np.float32) for leaf in norm_of(rng, 2000)]
    norm[2] += 1000  # sums of large numbers of both signs, whose digits float32 would lose
    folded = fold_pair(kernel, None, *norm, 1e-3, norm="before")
    assert [leaf.dtype for leaf in folded] == [np.float32, np.float32]
    exact = [leaf.astype(np.float64) for leaf in norm]
    wanted = normalised(np.zeros(2000), *exact, 1e-3) @ kernel.astype(np.float64)
    np.testing.assert_allclose(folded[1], wanted, rtol=1e-7)


@pytest.mark.parametrize(
    ("channels", "var", "place", "said"),
    [
        (3, 1.0, "after", "the norm has 3 channels and the layer 2 outputs"),
        (3, 1.0, "before", "the norm has 3 channels and the layer 4 inputs"),
        (2, -1.0, "after", "a variance is negative"),
        (2, np.nan, "after", "a variance is negative"),
    ],
)
def test_what_does_not_fit_is_refused(channels, var, place, said):
    one = np.ones(channels)
    with pytest.raises(ValueError, match=said):
        fold_pair(np.ones((4, 2)), None, one, one, one, var * one, 1e-3, norm=place)
