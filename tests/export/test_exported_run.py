"""`bnjax export` and `bnjax predict --model`: what is written of a run, and what is refused."""

import hashlib
import json
import shutil
import sys
from importlib.metadata import version

import jax
import numpy as np
import pytest
import small_digits
from PIL import Image

from bnjax import main
from bnjax.errors import UserError
from bnjax.export import stablehlo
from bnjax.export.stablehlo import Exported, export_run, program
from bnjax.train.trained import Trained

SMALL = [*small_digits.TINY, "--config.model.placement=before"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small network that was trained for two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    assert main.main(["--config", small_digits.CONFIG, "--workdir", str(workdir), *SMALL]) == 0
    return workdir


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The folder of the same, exported with ONNX."""
    out = tmp_path_factory.mktemp("models") / "small"
    assert main.main(["export", "--workdir", str(run), "--out", str(out), "--onnx"]) == 0
    return out


def edited(folder, **entries):
    """Changes entries of a manifest."""
    file = folder / stablehlo.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))
    return folder


def predicted(capsys, *words):
    assert main.main(["predict", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_manifest_says_what_it_is(run, exported):
    about = json.loads((exported / "manifest.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert about["name"] == config["config"]["name"] == "digits"
    assert about["classes"] == config["data"]["classes"]
    assert about["image_shape"] == config["data"]["image_shape"] == [32, 32, 3]
    assert about["step"] == 2
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    for name in ("jax", "bnjax"):
        assert about["versions"][name] == version(name)
    layers = ("conv0", "conv1", "conv2", "dense0", "dense1")
    assert about["folded"] == {f"{layer}_norm": layer for layer in layers}
    assert about["kept"] == {}
    assert sorted(about["files"]) == ["model.onnx", "model.stablehlo", "weights.safetensors"]
    assert about["agreement"]["images"] == "256 images of noise"
    assert max(about["agreement"][one] for one in ("stablehlo", "onnx")) < 1e-4


def test_predictions_are_the_runs(run, exported, capsys, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "right.png")
    Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).save(tmp_path / "large.png")
    np.save(tmp_path / "many.npy", rng.integers(0, 256, (3, 32, 32, 3), np.uint8))
    images = [tmp_path / name for name in ("right.png", "many.npy", "large.png")]
    of_run = predicted(capsys, "--workdir", run, *images)
    of_model = predicted(capsys, "--model", exported, *images)
    assert of_model["model"] == str(exported)
    assert (of_model["step"], of_model["dataset"]) == (2, "digits")
    for one, other in zip(of_model["predictions"], of_run["predictions"], strict=True):
        for name in ("image", "class", "note"):
            assert one.get(name) == other.get(name)
        # Half a step of 255 is what rounding may cost a pixel of the one that was resized.
        bound = 1e-5 if "note" not in one else 1e-2
        assert [*one["scores"].values()] == pytest.approx([*other["scores"].values()], abs=bound)
    assert main.main(["predict", "--model", str(exported), "missing.png"]) == 1
    assert "missing.png cannot be read" in capsys.readouterr().err


def test_norms_are_left_if_asked(run, capsys, tmp_path):
    words = ["export", "--workdir", str(run), "--out", str(tmp_path / "model"), "--no-fold"]
    assert main.main(words) == 0
    assert "conv0_norm is not folded: folding was not requested" in capsys.readouterr().out
    about = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert (about["folded"], len(about["kept"])) == ({}, 5)
    assert "batch_stats.conv0_norm.mean" in Exported(tmp_path / "model").weights
    assert not (tmp_path / "model" / "model.onnx").exists()


def test_a_folded_run_is_exported_as_it_is(run, exported, tmp_path):
    folded = ["--workdir", str(tmp_path / "folded"), "--out", str(tmp_path / "model")]
    assert main.main(["fold", "--workdir", str(run), "--out", str(tmp_path / "folded")]) == 0
    assert main.main(["export", *folded]) == 0
    found, wanted = (
        json.loads((one / "manifest.json").read_text()) for one in (tmp_path / "model", exported)
    )
    assert found["folded"] == wanted["folded"]
    assert found["files"]["weights.safetensors"] == wanted["files"]["weights.safetensors"]


def test_bfloat16_is_onnx_in_float32(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["config"]["model"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    about = export_run(Trained(tmp_path / "run", "last"), tmp_path / "model", onnx=True)
    assert about.arithmetic == "bfloat16"
    assert about.agreement["onnx"] < 1e-4 < about.agreement["stablehlo"] < 0.1


def test_nothing_is_written_if_it_cannot_be(run, monkeypatch, tmp_path):
    trained = Trained(run, "last")
    with pytest.raises(UserError, match="exists already"):
        export_run(trained, run)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(UserError, match=r"package onnxruntime.*pip install 'bnjax\[onnx\]'"):
            export_run(trained, tmp_path / "model", onnx=True)
    monkeypatch.setattr(stablehlo, "TOLERANCE", 1e-12)
    with pytest.raises(UserError, match=r"the StableHLO program differ .* nothing is written"):
        export_run(trained, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def spoil_weights(folder):
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "weights.safetensors").write_bytes(content)


def spoil_program(folder):
    """As a version of JAX would see a program that it does not know."""
    content = b"not what JAX writes" * 100
    (folder / "model.stablehlo").write_bytes(content)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["model.stablehlo"] = hashlib.sha256(content).hexdigest()
    edited(folder, files=files, versions={"jax": "0.1.2"}, exported="2020-01-02")


SPOILT = {
    "damaged": (spoil_weights, r"damaged.*SHA-256 of weights\.safetensors .*Export the run again"),
    "missing": (lambda folder: (folder / "model.onnx").unlink(), r"damaged.*model\.onnx"),
    "no JSON": (lambda folder: (folder / "manifest.json").write_text("{"), "damaged"),
    "older": (lambda folder: edited(folder, format=1), "format 1, not 2"),
    "newer": (lambda folder: edited(folder, unheard_of=1), "from a different version"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "no exported model"),
    "newer JAX": (
        spoil_program,
        "cannot load the program .* written by JAX 0.1.2 on 2020-01-02: .* 6 months older",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_model_that_cannot_be_read_says_why(exported, how, tmp_path):
    spoil, message = SPOILT[how]
    shutil.copytree(exported, tmp_path / "model")
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        Exported(tmp_path / "model")


def test_a_run_and_a_program_for_another_platform_are_refused(run, tmp_path):
    with pytest.raises(UserError, match="contains a run: give it as --workdir"):
        Exported(run)
    export_run(Trained(run, "last"), tmp_path / "model", platforms=["tpu"])
    with pytest.raises(UserError, match="is for tpu, but JAX uses cpu here"):
        Exported(tmp_path / "model")


def test_the_weights_are_no_part_of_the_program(run):
    """It is small, whatever the size of the network: shapes are enough to write it."""
    trained = Trained(run, "last")
    like = jax.eval_shape(lambda: (trained.params, trained.batch_stats))
    assert len(program(trained.model, *like, (32, 32, 3))) < 50_000
