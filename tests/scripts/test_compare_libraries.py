"""The table of libraries: its cells against closed forms, and the page against the script."""

import sys
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from compare_libraries import COLUMNS, LIBRARIES, cell

pytestmark = pytest.mark.scripts

KINDS = {kind.title: kind for kind in LIBRARIES if kind.there}
MEASUREMENTS = {
    title: measurement for columns in COLUMNS.values() for title, *measurement in columns
}
PAGE = (Path(__file__).parents[2] / "docs" / "libraries.md").read_text()


@pytest.fixture(autouse=True)
def _defaults():
    """JAX as its users have it: other libraries rely on what this suite forbids."""
    with jax.numpy_rank_promotion("allow"):
        yield


def values(title, kind):
    if kind not in KINDS:
        pytest.skip(f"{kind}, an optional library of the table, is not installed")
    _, function, arguments, options = MEASUREMENTS[title]
    return function(KINDS[kind](**options), *arguments)


@pytest.mark.parametrize("title", sorted(MEASUREMENTS.keys() - {"first steps", "one value"}))
def test_bnjax_agrees_with_float64(title):
    text, error = cell(KINDS["bnjax"], *MEASUREMENTS[title])
    assert not text.startswith("**")
    assert not error


KEPT, TRUE = 0.99 ** np.array([1, 10, 100]), 0.211
START_AT_ONE = ("bnjax", "Flax linen", "Flax NNX", "Keras on JAX")
FIRST_STEPS = dict.fromkeys(START_AT_ONE, KEPT / TRUE + 1 - KEPT)
FIRST_STEPS |= {
    "torch": KEPT / TRUE + (1 - KEPT) * 8 / 7,
    "Equinox, batch": KEPT / (1 - KEPT) / TRUE + 1,  # starts at 1, and is debiased from 0
    "Equinox, ema": np.ones(3),
    "Haiku": np.ones(3),
}


@pytest.mark.parametrize(
    ("title", "kind", "expected"),
    [
        *(("first steps", kind, expected) for kind, expected in FIRST_STEPS.items()),
        ("weight of a new batch", "Flax NNX", [0.1]),
        ("weight of a new batch", "torch", [0.9]),
        ("stored variance", "Equinox, batch", ["biased"]),
        ("stored variance", "torch", ["unbiased"]),
        ("masked shards", "Flax NNX", [2.75, (3.5 + 16) / 2 - 2.75**2]),  # means of shards' means
        ("masked shards", "Flax linen", [2.75, (3.5 + 16) / 2 - 2.75**2]),
        ("empty shard", "Flax NNX", [np.nan, np.nan]),
        ("unequal groups", "Flax linen", [7.5 * 6 / 2]),  # divided by the first group's size
        ("variance at 10,000", "Flax NNX", [0]),
        ("bfloat16 layer", "Flax NNX", [0, "float32"]),
        ("bfloat16 layer", "Flax linen", [1, "float32"]),
    ],
)
def test_closed_forms(title, kind, expected):
    for found, true in zip(values(title, kind), expected, strict=True):
        if isinstance(true, str):
            assert found == true
        else:
            np.testing.assert_allclose(found, true, rtol=1e-3, atol=1e-5)


def test_what_a_library_cannot_do_is_said():
    assert cell(KINDS["Equinox, batch"], *MEASUREMENTS["mask"]) == ("no `mask`", "")
    text, error = cell(KINDS["Flax NNX"], *MEASUREMENTS["mask [n], images"])
    assert text == "`ValueError`"
    assert error.startswith("`ValueError: ")
    bold, _ = cell(KINDS["Flax linen"], *MEASUREMENTS["one value"])
    assert bold == "**output 0**"


def test_haiku_with_a_policy_is_exact_in_bfloat16():
    """What the footnote on Haiku says."""
    hk, jmp = pytest.importorskip("haiku"), pytest.importorskip("jmp")
    policy = jmp.get_policy("params=float32,compute=float32,output=bfloat16")
    with hk.mixed_precision.push_policy(hk.BatchNorm, policy):
        assert values("bfloat16 input", "Haiku") == [1, "float32"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_has_the_figures_of_the_script(kind):
    row = f"\n| {kind} {version(KINDS[kind].package)} |"
    if row not in PAGE:
        pytest.skip(f"the page has the figures of another version of {kind}")
    section = PAGE[PAGE.index("## Shards") :]
    cells = section[section.index(row) :].splitlines()[1].split(" | ")[1:]
    for (_, *measurement), text in zip(COLUMNS["Shards"], cells, strict=True):
        assert text.split("[^")[0].removesuffix(" |") == cell(KINDS[kind], *measurement)[0]


def test_the_page_has_the_columns_and_rows_of_the_script():
    for section, columns in COLUMNS.items():
        titles = " | ".join(title for title, *_ in columns)
        assert f"## {section}\n" in PAGE
        assert f"|  | {titles} |\n" in PAGE
    for kind in LIBRARIES:
        assert PAGE.count(f"\n| {kind.title} ") == len(COLUMNS)
