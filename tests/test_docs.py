"""What the documentation and the configs' docstrings show is there and runs."""

import ast
import pkgutil
import re
import textwrap
from collections import Counter
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from foreign import ResNet

from bnjax import clinic
from bnjax.clinic.checks import ILLNESSES
from bnjax.main import COMMANDS
from bnjax.train_step import init_variables

ROOT = Path(__file__).parents[1]
FILES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
PAGES = {path.relative_to(ROOT): path.read_text() for path in FILES}
README, CONTRIBUTING, CHANGELOG = (
    PAGES[Path(f"{name}.md")] for name in ("README", "CONTRIBUTING", "CHANGELOG")
)
API, DEVICES, EVALUATION, INDEX, LOOP, RESULTS = (
    PAGES[Path(f"docs/{name}.md")]
    for name in ("api", "devices", "evaluation", "index", "loop", "results")
)
KINDS = {
    caption: [Path(f"docs/{name}.md") for name in names.split()]
    for caption, names in re.findall(r":caption: ([^\n]+)\n:hidden:\n\n(.*?)```", INDEX, re.DOTALL)
}
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
    exec(compile(block, "documentation", "exec"), names)
    return names


def test_someone_elses_loop_runs_and_learns(capsys):
    run_block("class Net")
    *steps, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in steps] == [str(step) for step in range(8, 129, 8)]
    assert ast.literal_eval(last)["accuracy"] > 0.9  # with statistics that are ready


def test_a_loop_with_pmap_and_an_augmentation_run():
    assert run_block("jax.pmap(", DEVICES)["metrics"].means()["accuracy"] >= 0
    assert run_block("augment.chain(", LOOP)["batch"]["label"].shape == (8, 10)


def test_the_clinic_looks_at_a_network(capsys):
    model, image = ResNet((1,), 2), np.random.default_rng(0).random((8, 8, 8, 3), np.float32)
    params, batch_stats = init_variables(model, jax.random.key(0), image)
    network = {"model": model, "params": params, "batch_stats": batch_stats}
    batches = [{"image": image, "label": np.arange(8)}] * 4
    run_block("clinic.audit(network", EVALUATION, **network, batches=batches)
    after = run_block("clinic.audit(network", **network, batches=batches)
    assert "never-updated" in capsys.readouterr().out
    assert (after["network"].batch_stats["norm_init"]["mean"] != 0).any()


def test_the_page_names_what_the_audit_finds():
    named = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", EVALUATION)) | {"stale"}
    assert named == set(ILLNESSES)


def test_every_command_is_one():
    assert set.union(*map(commands, PAGES.values())) == set(COMMANDS)
    for path in CONFIGS:
        assert commands(ast.get_docstring(ast.parse(path.read_text())) or "") <= set(COMMANDS), path


def test_every_name_can_be_imported():
    """Including names in code, where the changelog says that they are, and in CONTRIBUTING."""
    now = [text for text in PAGES.values() if text is not CHANGELOG]
    lines = "\n".join(line for text in now for line in code(text))
    shown = re.findall(r"\bbnjax(?:\.[A-Za-z]\w*)+", lines)
    moved = re.findall(r"^ *\| `bnjax[\w.]+` \| `(bnjax[\w.]+)`", CHANGELOG, re.MULTILINE)
    rows = re.findall(r"^\| [^|]+\? \| `([\w/]+)\.py` \| (.+) \|$", CONTRIBUTING, re.MULTILINE)
    decide = [
        f"bnjax.{file.replace('/', '.')}:{name}"
        for file, names in rows
        for name in re.findall(r"`(.+?)`", names)
    ]
    assert "bnjax.train.cpu.compiler_options" in shown
    assert min(len(moved), len(decide)) > 20
    for name in {*shown, *moved, *decide}:
        pkgutil.resolve_name(name)


def slugs(text):
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"\W+", "-", title.lower()).strip("-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_and_files_exist_lines_are_short_and_python_compiles(page):
    text = PAGES[page]
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        if not path.startswith("https://"):
            to = (ROOT / page.parent / path).resolve() if path else ROOT / page
            assert to.exists(), link
            assert not anchor or anchor in slugs(to.read_text()), link
    for name in re.findall(r"\b(?:bnjax|configs|docs|scripts|tests)/[\w/.-]+\.\w+", text):
        assert (ROOT / name).exists(), name
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 100 and "|" not in line] == []
    for block in re.findall(r"^ *```python.*?\n(.*?)```", text, re.DOTALL | re.MULTILINE):
        ast.parse(re.sub(r"^[!%].*", "", textwrap.dedent(block), flags=re.MULTILINE))


def test_the_public_names_of_the_clinic_are_in_the_reference():
    names = [name for name in vars(clinic) if not isinstance(vars(clinic)[name], ModuleType)]
    public = {name for name in names if not name.startswith("_")}
    assert {*re.findall(r"`(\w+)[`(]", API)} >= public - {"annotations"}


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(?:tests/)?([\w/]+\.py)::(\w+)", "".join(PAGES.values())))
    assert ("norms/test_against_flax.py", "test_drop_in") in named
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), (file, name)


def test_every_config_has_a_row():
    pages = "".join(PAGES.values())
    assert [path for path in CONFIGS if f"](../{path.relative_to(ROOT)})" not in pages] == []


def test_every_page_has_one_kind():
    assert KINDS.keys() >= {"How-to", "Reference", "Explanation", "Project"}
    pages = [page for page in PAGES if page.parent in (Path("docs"), Path("docs/guides"))]
    assert sorted(page for kind in KINDS.values() for page in kind) == sorted(
        {*pages} - {Path("docs/index.md")}
    )


def test_pages_are_short():
    assert len(README.splitlines()) <= 150
    for page in KINDS["How-to"]:
        with_output = 5 * ("```text" in PAGES[page])
        assert len(PAGES[page].splitlines()) <= 80 + with_output, page


def test_the_front_page_counts_the_verdicts():
    verdicts = Counter(
        re.findall(r"\| ((?:not )?reproduced|inconclusive) \|$", RESULTS, re.MULTILINE)
    )
    front = " ".join(README.split())
    assert f"tested {verdicts.total()} statements" in front
    assert (
        f"**{verdicts['reproduced']} are reproduced, {verdicts['not reproduced']} are not "
        f"reproduced, and {verdicts['inconclusive']} are inconclusive**" in front
    )
