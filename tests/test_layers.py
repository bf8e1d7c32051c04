"""Imports only point down: the order of the rooms, checked."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = [
    {"compat", "errors", "quiet", "text", "types"},
    {"loss", "norms", "metrics", "nonfinite"},
    {"models"},
    {"train_step"},
    {"data", "clinic"},
    {"train"},
    {"compare", "export"},
    {"commands"},
    {"main"},
]


MODULES = {
    str(path.relative_to(ROOT / "bnjax").with_suffix("")): ast.parse(path.read_text())
    for path in sorted((ROOT / "bnjax").rglob("*.py"))
    if path != ROOT / "bnjax/__init__.py"
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    floor = {name: number for number, names in enumerate(ORDER) for name in names}
    room, names = module.split("/")[0], []
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Import | ast.ImportFrom):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            names += [f"{prefix}{alias.name}" for alias in node.names]
    for other in {name.split(".")[1] for name in names if name.startswith("bnjax.")} - {room}:
        assert floor[other] < floor[room], f"{module} imports {other}"


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
    assert Counter(named) == Counter(name for name in MODULES if not name.endswith("__init__"))
