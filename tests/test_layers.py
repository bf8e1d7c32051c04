"""Imports only point down: the order of the rooms, checked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"compat", "errors", "quiet", "text", "types"},
    {"norms", "metrics"},
    {"models"},
    {"train_step"},
    {"data", "clinic"},
    {"train"},
    {"compare", "export"},
    {"commands"},
    {"main"},
]


def room(path):
    return path.relative_to(ROOT / "bnjax").with_suffix("").parts[0]


def imported(path):
    """The rooms of bnjax that a file imports from, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "bnjax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bnjax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("bnjax.")]
            yield from (name.split(".")[1] for name in names)


FILES = [
    path for path in sorted((ROOT / "bnjax").rglob("*.py")) if path != ROOT / "bnjax/__init__.py"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    floor = {name: number for number, names in enumerate(ORDER) for name in names}
    for name in set(imported(path)) - {room(path)}:
        assert floor[name] < floor[room(path)], f"{path} imports {name}"


def test_the_order_is_the_one_that_contributors_read():
    order = " < ".join(", ".join(sorted(names)) for names in ORDER)
    assert order in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
