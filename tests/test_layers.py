"""Imports only point down: the order of the rooms, checked."""

import ast
import re
from collections import Counter
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


def test_the_map_names_each_module_once():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(
        r"^\| (`[\w/.]+`|used by all) \| (.+) \|$", text.split("\n### ")[0], re.MULTILINE
    )
    named = []
    for where, what in rows:
        folder, words = where.strip("`"), re.sub(r"\([^)]*\)", "", what)
        if folder.endswith(".py"):
            named.append(folder.removesuffix(".py"))
        else:
            prefix = folder if folder.endswith("/") else ""
            named += [prefix + name for name in re.findall(r"`(\w+)`", words)]
    modules = [str(path.relative_to(ROOT / "bnjax").with_suffix("")) for path in FILES]
    assert Counter(named) == Counter(name for name in modules if not name.endswith("__init__"))
