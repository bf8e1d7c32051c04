"""Runs all parts of `scripts/accelerator.py` with tiny sizes on the CPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.scripts
SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("accelerator") / "page.md"
    command = [sys.executable, SCRIPTS / "accelerator.py", "--tiny", "--out", out]
    flags = "--xla_backend_optimization_level=0"  # compiles faster
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout == out.read_text()
    return out.read_text()


def rows(page, title):
    """The cells of each row of the section whose title starts with `title`."""
    (section,) = re.findall(rf"^## {title}.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [line.strip("| ").split(" | ") for line in lines]


def test_only_torch_may_be_missing(page):
    failed = re.findall(r"^Not measured: (.*)$", page, re.MULTILINE)
    if importlib.util.find_spec("torch"):
        assert not failed
    assert all("torch" in line for line in failed)


def test_each_section_has_its_rows(page):
    precisions = ["float32", "TF32", "bfloat16"]
    assert [row[0] for row in rows(page, "A matrix product")] == precisions
    step = [row for row in rows(page, "The tutorial's training step") if row[2] == "bnjax"]
    assert [row[1] for row in step] == precisions
    races = [row[:2] for row in rows(page, "Time to 94 %") if row[0].startswith("bnjax")]
    assert races == [[f"bnjax {name}", n] for name in ("airbench94", "speed94") for n in "12"]
    assert len(rows(page, "The ten longest kernels")) == 10
    assert [row[1] for row in rows(page, "The share of batch norm")] == ["float32", "bfloat16"]
    assert [row[0] for row in rows(page, "A whole process")] == ["empty", "filled"]


def test_the_cpu_agrees_with_itself(page):
    found = rows(page, "Agreement with the CPU")
    assert [(row[0], row[1], row[3]) for row in found] == [
        ("batch_stats", "0.0e+00", "yes"),
        ("params", "0.0e+00", "yes"),
    ]


def test_a_part_without_time_is_a_line_with_the_reason():
    words = ["--tiny", "--only", "kernels", "--minutes", "0"]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "accelerator.py", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    failed = re.findall(r"^Not measured: (.*)$", done.stdout, re.MULTILINE)
    assert failed == [f"{name}: no time was left." for name in ("products", "kernels")]


def test_the_first_process_does_not_import_jax():
    code = "import json, sys, accelerator; print(json.dumps('jax' in sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPTS, check=True
    )
    assert json.loads(done.stdout) is False
