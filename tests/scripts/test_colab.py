"""The notebook for Colab, executed from its first cell to its last."""

import base64
import io
import json
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pages
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from packaging.requirements import Requirement
from PIL import Image

pytestmark = [pytest.mark.scripts, pytest.mark.lane]

ROOT = Path(__file__).parents[2]
ADDRESS = "https://github.com/someone/bnjax"

# Replaces pip: stores its arguments, and makes bnjax importable; it can also "upgrade" JAX.
PIP = f"""
import os, pathlib, sys
packages = pathlib.Path(__file__).parents[1]
(packages / "asked").write_text(" ".join(sys.argv[1:]))
for name in ("bnjax", "configs"):
    (packages / name).symlink_to(pathlib.Path({str(ROOT)!r}) / name)
if "REPLACE_JAX" in os.environ:
    (packages / "jax").mkdir()
    text = "__version__ = '99'\\ndef devices(): return ['cpu']"
    (packages / "jax" / "__init__.py").write_text(text)
"""
# Lets each process find bnjax only where it starts or where the pip above puts it, not where it is
# installed, and hides JAX if asked.
FINDER = """
import importlib.machinery, os, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "jax" and "HIDE_JAX" in os.environ:
            return None
        path = [os.getcwd(), os.environ["PYTHONPATH"]] if name == "bnjax" else path
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Finder
"""
ASK_THE_PAGE = """
from gradio_client import Client, handle_file
from PIL import Image
Image.fromarray(digits.test.image[0]).save("digit.png")
answer = Client(address, verbose=False).predict([handle_file("digit.png")], api_name="/predict")
print("truth", digits.classes[digits.test.label[0]], "page", answer[0]["label"])
"""


def read_notebook():
    return nbformat.read(pages.NOTEBOOK, as_version=nbformat.NO_CONVERT)


@pytest.fixture(scope="module")
def execute(tmp_path_factory):
    """Executes a notebook in a folder without a network; returns pip's arguments."""
    home = tmp_path_factory.mktemp("home")
    kernel = home / "share" / "kernels" / "this"
    kernel.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (kernel / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "this", "language": "python"})
    )
    own = {"JUPYTER_PATH": home / "share", "JUPYTER_PLATFORM_DIRS": "1"}
    own |= dict.fromkeys(("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"), home / "own")
    own |= dict.fromkeys(("JUPYTER_CONFIG_DIR", "MPLCONFIGDIR", "BNJAX_CACHE"), home / "own")
    own |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    own |= {"no_proxy": "127.0.0.1,localhost", "XLA_FLAGS": ""}  # one device, full optimisation

    def run(notebook, folder, **variables):
        packages = tmp_path_factory.mktemp("packages")
        (packages / "pip").mkdir()
        (packages / "pip" / "__init__.py").touch()
        (packages / "pip" / "__main__.py").write_text(PIP)
        (packages / "sitecustomize.py").write_text(FINDER)
        resources = {"metadata": {"path": str(folder)}}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (own | {"PYTHONPATH": packages} | variables).items():
                patch.setenv(name, str(value))
            client = NotebookClient(notebook, timeout=600, kernel_name="this", resources=resources)
            client.execute()
        return (packages / "asked").read_text()

    return run


@pytest.fixture(scope="module")
def executed(execute, tmp_path_factory):
    """Executes the notebook unchanged in a clone; returns its cells by their ids."""
    clone = tmp_path_factory.mktemp("clone")
    (clone / "scripts").mkdir()
    (clone / "bnjax").symlink_to(ROOT / "bnjax")
    notebook = read_notebook()
    ask = nbformat.v4.new_code_cell(ASK_THE_PAGE, id="ask-the-page")
    notebook.cells.append(ask)
    assert execute(notebook, clone / "scripts") == f"install -q {clone}"
    return {cell.id: cell for cell in notebook.cells}


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def shown(cell, kind):
    (found,) = (output.data[kind] for output in cell.outputs if kind in output.get("data", {}))
    return found


def accuracies(cell):
    return [float(x) for x in re.findall(r"(?:accuracy|statistics) ([\d.]+)", printed(cell))]


def test_the_notebook_is_small_valid_without_outputs_and_has_the_address_in_pyproject():
    text, notebook = pages.NOTEBOOK.read_text(), read_notebook()
    assert text == pages.with_address(text, pages.repository()), "run python scripts/pages.py"
    assert len(text) < 60_000
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)  # which has ids
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (not cell.outputs and cell.execution_count is None)


def test_an_address_fills_in_the_one_value_and_adds_a_badge():
    text = pages.with_address(pages.NOTEBOOK.read_text(), "")
    filled_in = pages.with_address(text, ADDRESS)
    badge = "(https://colab.research.google.com/github/someone/bnjax/blob/main/scripts/colab.ipynb)"
    for notebook, address in ((text, ""), (filled_in, ADDRESS)):
        title, parameters = (cell.source for cell in nbformat.reads(notebook, 4).cells[:2])
        assert f'REPO = "{address}"' in parameters
        assert title.endswith(badge) == ("colab.research" in title) == bool(address)
    assert pages.with_address(filled_in, ADDRESS) == filled_in
    assert pages.with_address(filled_in, "") == text


def test_colab_has_the_packages_that_bnjax_requires():
    """Otherwise pip would replace JAX there, without its CUDA plugin."""
    constraints = (ROOT / "scripts" / "colab-constraints.txt").read_text()
    has = dict(re.findall(r"^([\w-]+)==(\S+)$", constraints, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = map(Requirement, project["dependencies"] + project["optional-dependencies"]["report"])
    wanted = {found.name: found.specifier for found in asked if found.name in has}
    assert {"jax", "flax", "optax", "orbax-checkpoint", "numpy", "altair"} <= set(wanted)
    assert [name for name, versions in wanted.items() if has[name] not in versions] == []


@pytest.fixture
def install(execute, tmp_path):
    """Executes the notebook up to the installation in a folder, with an address."""

    def run(address, **variables):
        notebook = nbformat.reads(pages.with_address(pages.NOTEBOOK.read_text(), address), 4)
        (last,) = (i for i, cell in enumerate(notebook.cells) if cell.id == "install")
        del notebook.cells[last + 1 :]
        return execute(notebook, tmp_path, **variables)

    return run


@pytest.mark.parametrize("missing", [{}, {"HIDE_JAX": "1"}], ids=["JAX is there", "no JAX"])
def test_outside_a_clone_the_address_is_installed(install, missing):
    assert install(ADDRESS, **missing) == f"install -q git+{ADDRESS}"


def test_a_clone_beside_the_notebook_is_installed(install, tmp_path):
    """Python finds the folder of the clone, which has no bnjax/__init__.py, as a package."""
    (tmp_path / "bnjax").mkdir()
    (tmp_path / "bnjax" / "bnjax").symlink_to(ROOT / "bnjax")
    assert install("") == f"install -q {tmp_path / 'bnjax'}"


@pytest.mark.parametrize(
    ("address", "variables", "said"),
    [
        ("", {}, "REPO is empty: set it to the https address"),
        (ADDRESS, {"REPLACE_JAX": "1"}, "JAX was replaced"),
    ],
)
def test_no_address_and_an_installation_that_replaces_jax_are_errors(
    install, address, variables, said
):
    with pytest.raises(CellExecutionError, match=said):
        install(address, **variables)


def test_the_network_falls_into_the_trap_and_both_cures_help(executed):
    training, trapped = accuracies(executed["trap"])
    assert training > 0.9
    assert trapped < 0.3  # chance is 0.1
    stored, precise = accuracies(executed["precise"])
    assert precise > 0.9
    assert precise > stored + 0.5
    assert "healthy: nothing found" in shown(executed["precise"], "text/html")
    assert min(accuracies(executed["momentum"])) > 0.85


def test_the_audit_is_a_table_with_the_finding(executed):
    table = " ".join(shown(executed["audit"], "text/html").split())  # without line breaks
    assert "BatchNorm_11" in table
    assert table.count(">not-converged</a>") >= 11  # a link in the row of each ill norm
    assert "the averages have not converged from their initial values" in table
    assert "44.8% (momentum ** updates) after 80" in table  # 0.99 ** 80


def test_the_curves_with_and_without_bn_are_drawn(executed):
    assert "the runs use the embedded digits" in printed(executed["curves-train"])
    reached = dict(re.findall(r"(with|without) BN: .* at step (\d+)", printed(executed["curves"])))
    assert int(reached["with"]) < int(reached["without"])
    figure = shown(executed["curves"], "image/png")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB"))
    for colour in ((31, 119, 180), (255, 127, 14)):  # with and without BN, in both diagrams
        drawn = (pixels == colour).all(-1)
        middle = pixels.shape[1] // 2
        assert min(drawn[:, :middle].sum(), drawn[:, middle:].sum()) > 200


def test_a_stopped_run_is_resumed_by_the_same_command(executed):
    stopped, resumed = printed(executed["stop"]), printed(executed["resume"])
    assert stopped.splitlines()[0] == resumed.splitlines()[0]
    at = int(re.search(r"stopped by SIGINT after step (\d+)", stopped)[1])
    assert 20 <= at < 60
    assert f"first command: steps 1 to {at}; second command: steps {at + 1} to 60" in resumed


def test_the_page_is_in_the_notebook_and_answers(executed):
    assert re.search(r'<iframe src="http://127.0.0.1:\d+', shown(executed["page"], "text/html"))
    truth, page = re.search(r"truth (\w+) page (\w+)", printed(executed["ask-the-page"])).groups()
    assert truth == page
