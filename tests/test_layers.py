"""Imports only point down: the table of contents of the README's architecture section, checked."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"arrays", "compat", "errors", "metrics", "norms", "optim", "platform", "products", "defaults", "signals", "statistics"},
    {"board", "configfile", "data", "models", "train_step"},
    {"evaluate", "checkpoint", "diagnose", "dispatch", "graph", "histograms", "writers"},
    {"config", "results"},
    {"claims", "summary", "watch", "workdir"},
    {"program", "text"},
    {"run"},
    {"loop"},
    {"seeds"},
    {"grid", "report"},
    {"main", "predict", "compare"},
]
# Within layer 0 these two may be used by the rest, and nothing else may.
GROUND = {"arrays", "errors"}


def noun(path):
    return path.relative_to(ROOT / "bnjax").with_suffix("").parts[0]


def imported(path):
    """The nouns of bnjax that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "bnjax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bnjax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("bnjax."))


FILES = [path for path in sorted((ROOT / "bnjax").rglob("*.py")) if path != ROOT / "bnjax" / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    layer_of = {name: layer for layer, names in enumerate(LAYERS) for name in names}
    mine = layer_of[noun(path)]
    for name in set(imported(path)) - {noun(path)}:
        assert layer_of[name] < mine or (mine == 0 and name in GROUND), f"{path.name} (layer {mine}) imports {name}"


def test_every_file_stays_readable():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 300, path


def test_versions_of_jax_are_told_apart_in_one_place():
    told = re.compile(r"(hasattr|getattr)\(jax|(jax|jaxlib|flax|optax|orbax)\.__version|version_info|from packaging")
    assert [path.name for path in FILES if told.search(path.read_text())] == ["compat.py"]


def test_configs_import_the_defaults_and_nothing_else():
    for path in sorted((ROOT / "configs").rglob("*.py")):
        assert set(imported(path)) <= {"defaults"}, path
