"""Verdicts by runs that are made up, wrong claim files, and the claims of the repository."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import comparison, statement

from bnjax.compare import claims, grid, intervals, runs
from bnjax.compare.claims import Statement, verdicts
from bnjax.compare.intervals import Estimate, Times
from bnjax.compare.runs import Run, value
from bnjax.data.datasets import Dataset, Split
from bnjax.errors import UserError
from bnjax.train import build, parsing
from bnjax.train.rundir import DataFacts

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs" / "claims").glob("*.py"))
GREATER = statement()
FASTER = statement(quantity="steps_to_loss", at=0.5, margin=1.0)


def run(variant, seed, losses=(0.9, 0.4), tests=((2, 1.0, 0.5),)):
    """A run with the loss of each training step, and (step, loss, accuracy) of each evaluation."""
    lines = [(step, "train", loss, 0.1) for step, loss in enumerate(losses, start=1)]
    lines += [(step, "test", loss, accuracy) for step, loss, accuracy in tests]
    keys = ("step", "split", "loss", "accuracy")
    metrics = [dict(zip(keys, line, strict=True)) for line in lines]
    seconds = {step: 1.5 * step for step in range(1, len(losses) + 1)}
    data = DataFacts("made_up", "made up", (8, 8, 1), ())
    return Run(Path(variant) / str(seed), variant, seed, {}, data, metrics, seconds, {"steps": 2})


def accuracies(variant, *values):
    return [run(variant, seed, tests=[(2, 1.0, value)]) for seed, value in enumerate(values)]


def outcome(statement, *arms, **more):
    compared = comparison("ab", statement, **more)
    (verdict,) = verdicts(compared, [one for arm in arms for one in arm])
    return verdict


B = accuracies("b", 0.50, 0.52, 0.51)


@pytest.mark.parametrize(
    ("values", "direction", "wanted"),
    [
        ((0.60, 0.61, 0.62), "greater", "reproduced"),
        ((0.59, 0.55, 0.50), "greater", "inconclusive"),  # too wide an interval
        ((0.50, 0.52, 0.51), "less", "not reproduced"),  # no difference at all
    ],
)
def test_the_interval_of_pairs_with_equal_seeds_decides(values, direction, wanted):
    a, claim = accuracies("a", *values), statement(direction=direction)
    verdict = outcome(claim, a, B)
    assert verdict.outcome == wanted
    found = (verdict.effect.value, verdict.of.value, verdict.against.value)
    assert found == pytest.approx((np.mean(values) - 0.51, np.mean(values), 0.51))
    assert verdict.of == intervals.mean_accuracy(values)
    assert verdict.effect == intervals.difference(values, (0.50, 0.52, 0.51))
    assert outcome(claim, a[::-1], B).effect == verdict.effect


def test_too_few_seeds_and_unfinished_runs_are_inconclusive_whatever_the_interval():
    a = accuracies("a", 0.60, 0.61, 0.62)
    for arm, b, more, reason in (
        (a, B, {"needed": 5}, "only 3 of the 5 required seeds are finished"),
        ([a[0], a[2]], B, {"needed": 2}, "unfinished: a/1"),
        (a[:1], B[:1], {"seeds": 1, "needed": 1}, "a single seed gives no interval"),
        (accuracies("a", 0.6, None, 0.6), B, {}, "some runs have no finite value at this point"),
    ):
        verdict = outcome(GREATER, arm, b, **more)
        assert (verdict.outcome, verdict.reason) == ("inconclusive", reason)
        assert verdict.effect is None or verdict.effect.n == len(arm)
    assert outcome(GREATER, [], B).effect is None


def steps(variant, *counts, most=40):
    """Runs whose loss falls below 0.5 after so many steps, or never in `most`."""
    return [
        run(variant, seed, losses=[0.9] * (count - 1) + [0.4] if count <= most else [0.9] * most)
        for seed, count in enumerate(counts)
    ]


def test_ratios_of_steps_are_bounds_where_runs_never_got_there():
    b, slow = steps("b", 7, 8, 6), steps("a", 35, 39, 31)
    five = {**FASTER, "direction": "equal", "margin": 1.25, "expected": 5}
    assert outcome(five, slow, b).outcome == "reproduced"
    assert outcome(five, steps("a", 14, 16, 12), b).outcome == "not reproduced"
    verdict = outcome(FASTER, slow, b)
    assert (verdict.outcome, verdict.against.value) == ("reproduced", 7)
    assert verdict.logrank is None
    never = steps("a", 35, 99, 99)
    verdict = outcome(FASTER, never, b)
    assert verdict.outcome == "reproduced"
    assert verdict.effect.high == verdict.of.value == math.inf
    assert 0 < verdict.logrank < 0.1
    # A bound from below cannot show that the ratio is small, nor that it is about five.
    about = {**FASTER, "direction": "equal", "margin": 9.0}
    assert outcome(about, never, b).outcome == "inconclusive"
    assert outcome(FASTER, steps("a", 99, 99, 99), steps("b", 99, 99, 99)).outcome == "inconclusive"
    for words in (
        "REPRODUCED: steps to loss 0.5: a / b is greater than 1",
        "found at least 5.503 [",
        "log-rank test: p = 0.0",
        "a not reached by half the runs",
        "claimed by: me",
    ):
        assert words in str(verdict)


def test_what_is_read_off_a_run():
    tests = [(2, 1.2, 0.5), (3, 1.0, 0.4), (4, 1.1, 0.3)]
    one = run("a", 0, losses=[0.9, None, 0.3, 0.6], tests=tests)
    found = {at: value(one, "test_loss", at) for at in ("first", "last", "best", 3, 1)}
    assert found == {"first": 1.2, "last": 1.1, "best": 1.0, 3: 1.0, 1: None}
    assert value(one, "test_accuracy", "best") == 0.5
    assert value(one, "train_loss", 2) is None
    assert value(one, "train_loss", "best") == 0.3
    for quantity, goal, taken, reached in (
        ("steps_to_loss", 0.3, 3, True),
        ("steps_to_loss", 0.2, 4, False),
        ("steps_to_accuracy", 0.5, 2, True),
        ("seconds_to_accuracy", 0.5, 3.0, True),
        ("seconds_to_accuracy", 0.6, 6.0, False),
    ):
        assert runs.times([one], quantity, goal) == Times((taken,), (reached,))


@given(
    st.sampled_from(["greater", "less", "equal"]),
    st.floats(0, 1),
    st.floats(-2, 2),
    st.floats(-2, 2),
    st.floats(-1, 1),
    st.booleans(),
)
def test_a_verdict_agrees_with_every_value_in_the_interval(
    direction, margin, one, other, expected, is_time
):
    low, high = sorted((one, other))
    scale = math.exp if is_time else float
    fields = {"direction": direction, "margin": scale(margin), "expected": scale(expected)}
    claim = Statement(**(FASTER if is_time else GREATER) | fields)
    estimate = Estimate(scale((low + high) / 2), scale(low), scale(high), 3, "")
    points = np.array([low, np.clip(expected, low, high), high]) - expected
    holds = {
        "greater": points > margin,
        "less": points < -margin,
        "equal": np.abs(points) <= margin,
    }[direction]
    if np.abs(np.abs(points) - margin).min() > 1e-9:  # none at the edge
        unclear = "inconclusive" if holds.any() else "not reproduced"
        assert claims.decide(claim, estimate)[0] == ("reproduced" if holds.all() else unclear)


def changed(**statement):
    return {
        "question": "q",
        "variants": {"a": ("a.py", {}), "b": ("b.py", {})},
        "statements": [GREATER | statement],
        "seeds": 3,
        "full": {},
    }


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        (changed(quantity="speed"), "quantity: train_loss"),
        (changed(at="middle"), "at: first, last, best or a step"),
        (changed(direction="more"), "direction: greater, less, equal"),
        (changed(margin=-0.1), "margin: 0 or above"),
        (changed(quantity="steps_to_loss", at=0.2, margin=0.5), "margin: 1 or above"),
        (changed(quantity="steps_to_loss"), "at: a number"),
        (changed(source=""), "source: a text"),
        (changed(expected="five"), "expected: a number"),
        (changed(of="c"), "unknown variants: c"),
        (changed() | {"seeds": 1}, "a claim needs at least one variant and two seeds"),
        (changed() | {"tiny": {}}, "unexpected keyword argument 'tiny'"),
        (changed() | {"full": None}, "TypeError"),
        ("def get_claim(): return 1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_wrong_claim_file_is_one_paragraph(tmp_path, claim, said):
    file = tmp_path / "claim.py"
    file.write_text(claim if isinstance(claim, str) else f"def get_claim(): return {claim!r}")
    with pytest.raises(UserError, match=r"claim file .* cannot be used") as error:
        claims.load(str(file))
    assert said in str(error.value)


@pytest.fixture(scope="module")
def images():
    split = Split(np.zeros((50_000, 32, 32, 3), np.uint8), np.zeros(50_000, np.int32))
    return Dataset("cifar10", "cifar10", True, split, split, tuple("abcdefghij"))


LONG = ("five_times", "low_momentum")  # whose runs take minutes: three seeds


@pytest.mark.parametrize("full", [False, True], ids=["small", "full"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_claim_builds_and_its_docstring_gives_command_source_time_and_margin(path, full, images):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    command = f"--claim configs/claims/{path.stem}.py --workdir runs/{path.stem}"
    for said in (command, "Source: ", "Time: ", "Margin: "):
        assert said in doc
    assert f"configs/claims/{path.name}" in (ROOT / "docs" / "results.md").read_text()
    claim = claims.load(str(path))
    found = grid.plan(claim, [], full=full)
    assert found["seeds_needed"] >= (3 if path.stem in LONG else 5)
    assert found["statements"]
    is_small = not full and claim.small is not None
    assert found["size"] == ("small" if is_small else "full")
    leaves = []
    for name, variant in found["variants"].items():
        config = parsing.from_dict(variant["config"])
        assert config.name == name
        assert build.experiment(config, images).steps > 0
        if is_small:
            # 60,000 images of a network with a thirtieth of the work, or 6,000 steps of a few.
            train, size = config.train, config.data.train_images
            steps = train.steps or train.epochs * size / train.batch_size
            assert size <= 10_000
            assert steps <= min(6000, 60_000 / train.batch_size)
        flat = parsing.flat(variant["config"])
        # The variant's own values are stronger than those that all have in common.
        about = (claim.small if is_small else claim.full) | claim.variants[name][1]
        assert {key: flat[key] for key in about} == json.loads(json.dumps(about))
        leaves.append(json.dumps(flat | {"name": ""}))
    assert len({*leaves}) == len(leaves), "variants that do not differ"
