"""What README, CONTRIBUTING, CHANGELOG and the configs' docstrings show is there and runs."""

import ast
import pkgutil
import re
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from foreign import ResNet

from bnjax.main import COMMANDS
from bnjax.stats.illnesses import ILLNESSES
from bnjax.train_step import init_variables

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING, CHANGELOG, EVALUATION = (
    (ROOT / f"{name}.md").read_text()
    for name in ("README", "CONTRIBUTING", "CHANGELOG", "docs/evaluation")
)
TEXTS = pytest.mark.parametrize(
    "text", [README, CONTRIBUTING, EVALUATION], ids=["README", "CONTRIBUTING", "evaluation"]
)
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


def code(text):
    """Returns the lines of code in a text: its fenced blocks, spans and indented lines."""
    found = re.findall(r"```\w*\n(.*?)```|`([^`]+)`|^    ([^\n]+)$", text, re.DOTALL | re.MULTILINE)
    return [line for block in found for part in block for line in part.splitlines()]


def commands(text):
    """Returns the commands of bnjax that a text shows."""
    shown = re.compile(r"(?:^|&& |-m )bnjax(?:\.main)? ([a-z]+(?:\|[a-z]+)*)")
    found = [name for line in code(text) for name in shown.findall(line)]
    return {command for names in found for command in names.split("|")}


def run_block(words, text=README, **names):
    """Runs the one block of Python in a text that has these words in it; returns its names."""
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (block,) = (block for block in blocks if words in block)
    names = {"__name__": "readme", **names}
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_someone_elses_loop_runs_and_learns(capsys):
    run_block("class Net")
    *steps, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in steps] == [str(step) for step in range(1, 9)]
    assert "accuracy" in last


def test_a_loop_with_pmap_runs():
    assert run_block("jax.pmap(")["metrics"].means()["accuracy"] >= 0


def test_the_clinic_looks_at_a_network(capsys):
    model, image = ResNet((1,), 2), np.random.default_rng(0).random((8, 8, 8, 3), np.float32)
    params, batch_stats = init_variables(model, jax.random.key(0), image)
    network = {"model": model, "params": params, "batch_stats": batch_stats}
    batches = [{"image": image, "label": np.arange(8)}] * 4
    run_block("audit(model", EVALUATION, **network, batches=batches)
    after = run_block("audit(model", **network, batches=batches)
    assert "never-updated" in capsys.readouterr().out
    assert (after["batch_stats"]["norm_init"]["mean"] != 0).any()


def test_the_page_names_what_the_audit_finds():
    named = set(re.findall(r"`([a-z]+-[a-z]+)`", EVALUATION)) | {"stale"}
    assert named == set(ILLNESSES)


def test_every_command_is_one():
    assert commands(EVALUATION) <= set(COMMANDS)
    assert commands(README) == set(COMMANDS)
    assert commands(CONTRIBUTING) <= set(COMMANDS)
    for path in CONFIGS:
        assert commands(ast.get_docstring(ast.parse(path.read_text())) or "") <= set(COMMANDS), path


def test_every_module_and_name_can_be_imported():
    lines = code(README) + code(CONTRIBUTING)
    named = {name for line in lines for name in re.findall(r"\bbnjax(?:\.[A-Za-z]\w*)+", line)}
    assert "bnjax.train.xla.compiler_options" in named
    for name in named:
        pkgutil.resolve_name(name)


def test_what_was_moved_is_where_the_changelog_says():
    unreleased = CHANGELOG.split("\n## ")[1]
    moved = re.findall(r"^ *\| `bnjax[\w.]+` \| `(bnjax[\w.]+)`", unreleased, re.MULTILINE)
    assert moved
    for name in moved:
        pkgutil.resolve_name(name)


@TEXTS
def test_every_link_leads_somewhere(text):
    slugs = {re.sub(r"\W+", "-", title.lower()) for title in re.findall(r"^#+ (.+)$", text, re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        assert path.startswith("https://") or (ROOT / path).exists(), link
        assert path or anchor in slugs, link


@TEXTS
def test_every_file_that_it_names_exists(text):
    for name in re.findall(r"\b(?:bnjax|configs|scripts|tests)/[\w/.-]+\.\w+", text):
        assert (ROOT / name).exists(), name


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)", README + CONTRIBUTING))
    assert ("norms/test_against_flax.py", "test_drop_in") in named
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


def test_the_map_names_every_module():
    modules = [path.stem for path in (ROOT / "bnjax").rglob("[!_]*.py")]
    assert len(modules) > 30
    assert [name for name in modules if not re.search(rf"`{name}(\.py)?`", CONTRIBUTING)] == []


def test_every_config_is_in_the_readme():
    assert [path for path in CONFIGS if f"]({path.relative_to(ROOT)})" not in README] == []


def test_the_table_of_norms_is_the_scripts():
    rows = runpy.run_path(str(ROOT / "scripts" / "compare_flax.py"))["FEATURES"].strip().split("\n")
    for feature, test in zip(rows[::2], rows[1::2], strict=True):
        assert f"| {feature} | `norms/{test.strip()}` |" in README
