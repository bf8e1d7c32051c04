"""Colab's notebook and the documentation's cell, from an empty folder to their last line."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement
from PIL import Image

pytestmark = pytest.mark.scripts

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "scripts" / "colab.ipynb"
(CELL,) = re.findall(r"```python\n(REPO = .*?)```", (ROOT / "docs/start.md").read_text(), re.DOTALL)

# What takes pip's place: it says what it was asked for, and where told so, it "upgrades" jax.
PIP = """
import os, pathlib, sys
pathlib.Path(os.environ["ASKED"]).write_text(" ".join(sys.argv[1:]))
if "BREAK" in os.environ:
    jax = pathlib.Path(__file__).parents[1] / "jax"
    jax.mkdir()
    (jax / "__init__.py").write_text("__version__ = '99'\\ndef devices(): return ['cpu']")
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """Returns what executes a notebook in an empty folder, as on a new machine without a network.

    `REPO` is a repository of its own, with this one's configs; pip only says what it was asked for.
    """
    home = tmp_path_factory.mktemp("home")
    repository = home / "repository"
    for path in (ROOT / "configs").glob("*.py"):
        (repository / "configs").mkdir(parents=True, exist_ok=True)
        (repository / "configs" / path.name).write_text(path.read_text())
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (("init", "-q"), ("add", "."), (*author, "commit", "-q", "-m", "configs")):
        subprocess.run(["git", *words], cwd=repository, check=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = home / "share" / "kernels" / "this"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "this", "language": "python"})
    )
    own = {"JUPYTER_PATH": home / "share", "JUPYTER_PLATFORM_DIRS": "1"}
    own |= dict.fromkeys(("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"), home / "own")
    own |= dict.fromkeys(("JUPYTER_CONFIG_DIR", "MPLCONFIGDIR", "BNJAX_CACHE"), home / "own")

    def execute(notebook, folder, **more):
        packages = folder.with_name(folder.name + "-packages")
        (packages / "pip").mkdir(parents=True)
        (packages / "pip" / "__init__.py").touch()
        (packages / "pip" / "__main__.py").write_text(PIP)
        folder.mkdir()
        paths = [packages, ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        with pytest.MonkeyPatch.context() as patch:
            for name, value in own.items():
                patch.setenv(name, str(value))
            patch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
            patch.setenv(
                "PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
            )
            patch.setenv("XLA_FLAGS", "")  # one device, and code as fast as a user's
            patch.setenv("ASKED", str(packages / "asked"))
            for name in ("http_proxy", "https_proxy"):
                patch.setenv(name, "http://127.0.0.1:9")
            for name, value in more.items():
                patch.setenv(name, value)
            path = {"metadata": {"path": str(folder)}}
            NotebookClient(notebook, timeout=900, kernel_name="this", resources=path).execute()
        return (packages / "asked").read_text()

    execute.repository = repository
    return execute


def filled_in(text, repository):
    assert text.count('REPO = ""') == 1
    return text.replace('REPO = ""', f"REPO = {str(repository)!r}")


def the_notebook(repository):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.id == "parameters")
    cell.source = filled_in(cell.source, repository)
    return notebook


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


@pytest.fixture(scope="module")
def executed(machine, tmp_path_factory):
    """The executed cells that have outputs, by their ids, and the folder in which they ran."""
    folder = tmp_path_factory.mktemp("content") / "content"
    notebook = the_notebook(machine.repository)
    asked = machine(notebook, folder)
    assert asked == f"install -q {folder / 'bnjax-clone'}"
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}, folder


def test_the_notebook_is_small_valid_and_without_outputs():
    assert NOTEBOOK.stat().st_size < 60_000
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)  # which has ids
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_what_colab_has_is_enough():
    """Otherwise pip would replace jax there, and leave its CUDA plugin behind."""
    constraints = (ROOT / "scripts" / "colab-constraints.txt").read_text()
    has = dict(re.findall(r"^([\w-]+)==(\S+)$", constraints, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = map(Requirement, project["dependencies"] + project["optional-dependencies"]["report"])
    wanted = {found.name: found.specifier for found in asked if found.name in has}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "altair"} <= set(wanted)
    assert [name for name, versions in wanted.items() if has[name] not in versions] == []


@pytest.mark.slow
def test_every_cell_runs(executed):
    cells, _ = executed
    assert all(cell.execution_count for cell in cells.values())
    assert not [
        output
        for cell in cells.values()
        for output in cell.outputs
        if output.output_type == "error"
    ]
    assert "training on digits" in printed(cells["data"])


@pytest.mark.slow
def test_the_curves_are_drawn_and_the_runs_behind_them_are_complete(executed):
    cells, folder = executed
    for arm in ("bn", "no_bn"):
        steps = train_steps(folder / "runs" / f"digits-{arm}")
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > 100
        assert f"digits-{arm}: training loss 0.2 at step" in printed(cells["curves"])
    (figure,) = (output.data["image/png"] for output in cells["curves"].outputs if "data" in output)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB"))
    for colour in ((31, 119, 180), (255, 127, 14)):  # one of each arm, in both pictures
        drawn = (pixels == colour).all(-1)
        middle = pixels.shape[1] // 2
        assert min(drawn[:, :middle].sum(), drawn[:, middle:].sum()) > 200


def train_steps(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["split"] == "train"]


def accuracies(cell):
    (train, test) = re.search(
        r"train accuracy ([\d.]+), test accuracy ([\d.]+)", printed(cell)
    ).groups()
    return float(train), float(test)


def train_accuracy_at_chance(cell):
    """Returns the training accuracy of a network whose test accuracy is as if it guessed."""
    train, test = accuracies(cell)
    assert test < 0.2  # chance is 0.1
    return train


@pytest.mark.slow
def test_the_trap_is_shown_and_cured(executed):
    cells, _ = executed
    assert train_accuracy_at_chance(cells["trap"]) > 0.85
    lines = printed(cells["cure"]).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["momentum 0.75", "momentum 0.99, debias"]
    for line in lines:
        cured_train, cured_test = map(float, re.findall(r"accuracy ([\d.]+)", line))
        # Of the training itself rounding decides: over seeds it ends between .87 and .99.
        assert cured_test > max(0.8, cured_train - 0.1)
    assert accuracies(cells["loop"])[1] > 0.8


@pytest.mark.slow
def test_the_mistake_leaves_the_statistics_where_they_were(executed):
    cells, _ = executed
    assert train_accuracy_at_chance(cells["mistake"]) > 0.8
    kept, returned = (
        json.loads(found.replace("'", '"'))
        for found in re.findall(r"{.*}", printed(cells["mistake"]))
    )
    assert kept == {"mean": 0.0, "var": 0.0}
    assert min(returned.values()) > 0.01


@pytest.mark.slow
def test_a_stopped_run_goes_on_by_the_same_command(executed):
    cells, folder = executed
    stopped, went_on = printed(cells["stop"]), printed(cells["resume"])
    assert "stopped by SIGINT after step" in stopped
    assert "exit code 130" in stopped
    at = int(re.search(r"after step (\d+)", stopped)[1])
    assert 20 <= at < 60
    assert f"steps {at + 1} to 60" in went_on
    assert stopped.splitlines()[0] == went_on.splitlines()[0]
    assert train_steps(folder / "runs" / "stopped") == list(range(1, 61))


@pytest.mark.slow
def test_an_image_is_predicted(executed):
    cells, _ = executed
    text = printed(cells["predict"])
    truth = re.search(r"It is: (\w+)\.", text)[1]
    assert re.search(rf"image\.png\s+{truth}\b", text)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["notebook", "page"])
def test_an_installation_that_replaces_jax_is_told(which, machine, tmp_path):
    if which == "notebook":
        notebook = the_notebook(machine.repository)
    else:
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(filled_in(CELL, machine.repository))]
        )
    with pytest.raises(CellExecutionError, match="AssertionError"):
        machine(notebook, tmp_path / "content", BREAK="1")
    assert not list((tmp_path / "content").rglob("metrics.jsonl"))


@pytest.mark.slow
def test_the_cell_of_the_page_installs_and_trains(machine, tmp_path):
    source = filled_in(CELL, machine.repository)
    assert source.count("configs/bn.py") == 1
    source = source.replace("configs/bn.py", "configs/digits.py --config.train.epochs=1")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    asked = machine(notebook, tmp_path / "content")
    assert asked.split() == ["install", "-q", "./bnjax-clone"]
    summary = json.loads(
        (tmp_path / "content" / "bnjax-clone" / "runs" / "digits" / "summary.json").read_text()
    )
    assert summary["steps"] == 11
