"""Every config in configs/ builds, and its docstring says how to run it and what comes out."""

import ast
import runpy
from pathlib import Path

import numpy as np
import pytest

from bnjax.data.datasets import Dataset, Split
from bnjax.norms import Identity
from bnjax.train import build, parsing

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def experiment(path, n=50_000):
    split = Split(np.zeros((n, 32, 32, 3), np.uint8), np.zeros(n, np.int32))
    config = parsing.load(str(path), [])
    build.check(config)
    return build.experiment(
        config, Dataset("cifar10", "cifar10", True, split, split, tuple("abcdefghij"))
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_builds_and_its_docstring_gives_command_time_and_result(path):
    assert experiment(path).steps > 0
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert f"python -m bnjax.main --config configs/{path.name}" in doc
    assert "Time: " in doc
    assert "Expected: " in doc
    assert callable(runpy.run_path(str(path))["get_config"])


def test_the_tutorials_schedule():
    found = experiment(FILES[0].with_name("bn.py"))
    assert (found.steps, found.eval_every, found.batch_size, found.shuffle) == (
        100,
        20,
        5000,
        False,
    )
    assert experiment(FILES[0].with_name("no_bn.py")).steps == 400
    assert experiment(FILES[0].with_name("no_bn.py")).model.norm.func is Identity
