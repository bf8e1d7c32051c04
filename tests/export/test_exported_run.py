"""`bnjax export` and `bnjax predict --model`: what is written of a run, and what is refused."""

import dataclasses
import datetime
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import jax
import numpy as np
import outside
import pytest
import small_digits
from PIL import Image

from bnjax import main
from bnjax.errors import UserError
from bnjax.export import stablehlo
from bnjax.export import stablehlo as export
from bnjax.export.stablehlo import Exported
from bnjax.train.trained import Trained
from bnjax.train_step import forward

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


@pytest.fixture
def copy(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    return tmp_path / "model"


def edited(folder, **entries):
    """Changes entries of a manifest."""
    file = folder / stablehlo.FILE
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
    assert (about["image_dtype"], about["step"]) == ("uint8", 2)
    assert about["platforms"] == ["cpu", "cuda", "tpu"]
    assert about["onnx"] == {"opset": 18, "ir_version": 8, "arithmetic": "float32"}
    assert {name: about["versions"][name] for name in ("jax", "bnjax")} == {
        name: version(name) for name in ("jax", "bnjax")
    }
    layers = ("conv0", "conv1", "conv2", "dense0", "dense1")
    assert about["folded"] == {f"{layer}_norm": layer for layer in layers}
    assert about["kept"] == {}
    assert sorted(about["files"]) == ["model.onnx", "model.stablehlo", "weights.safetensors"]
    assert about["agreement"]["images"] == "256 images of noise"
    assert max(about["agreement"][one] for one in ("stablehlo", "onnx")) < 1e-4
    days = [datetime.date.fromisoformat(about["exported"])]
    days.append(datetime.date.fromisoformat(about["window"]["not_if_built_after"]))
    assert 181 <= (days[1] - days[0]).days <= 184
    assert about["window"]["written_with_jax"] == version("jax")


@pytest.mark.parametrize(
    ("day", "end"), [("2026-03-31", "2026-09-30"), ("2027-08-30", "2028-02-29")]
)
def test_six_months_later_is_a_day_that_exists(day, end):
    window = stablehlo.window(datetime.date.fromisoformat(day), "1")
    assert window["not_if_built_after"] == end


def test_logits_outside_are_the_runs(run, exported, tmp_path):
    trained = Trained(run, "last")
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    variables = (trained.params, trained.batch_stats)
    own, _ = forward(*variables, {"image": images}, model=trained.model, train=False)
    for script, banned in ((outside.WITH_JAX, "bnjax"), (outside.WITHOUT_JAX, "bnjax,jax")):
        ((logits, _),) = outside.run(script, banned, [(exported, images)], tmp_path)
        np.testing.assert_allclose(logits, own, rtol=0, atol=1e-4 * np.abs(own).max())


def test_predictions_are_the_runs(run, exported, capsys, tmp_path):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / "right.png")
    Image.fromarray(rng.integers(0, 256, (40, 50), np.uint8)).save(tmp_path / "large.png")
    np.save(tmp_path / "many.npy", rng.integers(0, 256, (3, 32, 32, 3), np.uint8))
    images = [tmp_path / name for name in ("right.png", "many.npy", "large.png")]
    of_run = predicted(capsys, "--workdir", run, *images)
    env = {**os.environ, "PYTHONPATH": str(outside.ROOT), "XLA_FLAGS": ""}
    words = [sys.executable, "-m", "bnjax.main", "predict", "--model", exported, "--json", *images]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=True, timeout=240)
    of_model = json.loads(done.stdout)
    assert of_model["model"] == str(exported)
    assert (of_model["step"], of_model["dataset"]) == (2, "digits")
    for one, other in zip(of_model["predictions"], of_run["predictions"], strict=True):
        assert {name: one.get(name) for name in ("image", "class", "note")} == {
            name: other.get(name) for name in ("image", "class", "note")
        }
        # Half a step of 255 is what rounding may cost a pixel of the one that was resized.
        bound = 1e-5 if "note" not in one else 1e-2
        assert [*one["scores"].values()] == pytest.approx([*other["scores"].values()], abs=bound)


def test_more_images_than_are_computed_at_once(exported):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    model = Exported(exported)
    np.testing.assert_allclose(model.logits(images, 2), model.logits(images, 5), atol=1e-5)


def test_norms_are_left_if_asked(run, capsys, tmp_path):
    words = ["export", "--workdir", str(run), "--out", str(tmp_path / "model"), "--no-fold"]
    assert main.main(words) == 0
    assert "conv0_norm stays: folding was not asked for" in capsys.readouterr().out
    about = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert (about["folded"], len(about["kept"]), about["onnx"]) == ({}, 5, None)
    assert "batch_stats.conv0_norm.mean" in Exported(tmp_path / "model").weights
    assert not (tmp_path / "model" / "model.onnx").exists()


def test_a_folded_run_is_exported_as_it_is(run, exported, tmp_path):
    folded = ["--workdir", str(tmp_path / "folded"), "--out", str(tmp_path / "model")]
    assert main.main(["fold", "--workdir", str(run), "--out", str(tmp_path / "folded")]) == 0
    assert main.main(["export", *folded, "--onnx"]) == 0
    found = [
        json.loads((one / "manifest.json").read_text()) for one in (tmp_path / "model", exported)
    ]
    assert found[0]["folded"] == found[1]["folded"]
    assert found[0]["files"]["weights.safetensors"] == found[1]["files"]["weights.safetensors"]


def test_bfloat16_is_onnx_in_float32(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["config"]["model"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    about = export.export_run(Trained(tmp_path / "run", "last"), tmp_path / "model", onnx=True)
    assert (about.arithmetic, about.onnx["arithmetic"]) == ("bfloat16", "float32")
    assert about.agreement["onnx"] < 1e-4 < about.agreement["stablehlo"] < 0.1


def test_nothing_is_written_if_logits_differ_or_the_folder_is_taken(run, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        export.export_run(Trained(run, "last"), run)
    trained = Trained(run, "last")
    monkeypatch.setattr(export, "TOLERANCE", 1e-12)
    with pytest.raises(UserError, match=r"the StableHLO program differ .* nothing is written"):
        export.export_run(trained, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_package_that_is_missing_is_named(run, monkeypatch, tmp_path):
    for name in ("onnx", "onnxruntime"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            patch.delitem(sys.modules, "bnjax.export.onnx", raising=False)
            patch.delitem(sys.modules, "bnjax.export.onnx", raising=False)
            with pytest.raises(UserError, match=r"package onnx.*pip install 'bnjax\[onnx\]'"):
                export.export_run(Trained(run, "last"), tmp_path / "model", onnx=True)


@pytest.mark.parametrize("name", ["model.stablehlo", "weights.safetensors"])
def test_files_that_are_damaged_or_missing_are_named(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged.*SHA-256"):
        Exported(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        Exported(copy)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "damaged"),
        ('{"name": "x"}', "damaged"),
        (None, "no exported model"),
    ],
)
def test_a_manifest_that_is_damaged_or_missing_is_said(copy, content, said):
    (copy / "manifest.json").unlink()
    if content is not None:
        (copy / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=f"{said}.*(Export the run again|bnjax export)"):
        Exported(copy)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"format": 2}, "its format is 2, and this bnjax reads 1"),
        ({"unheard_of": 1}, "damaged, or from another version"),
    ],
)
def test_a_manifest_that_does_not_fit_is_said(copy, entries, said):
    with pytest.raises(UserError, match=said):
        Exported(edited(copy, **entries))


def test_a_run_is_no_model(run):
    with pytest.raises(UserError, match="It holds a run: give it with --workdir"):
        Exported(run)


def test_a_program_for_another_platform_says_which(run, tmp_path):
    export.export_run(Trained(run, "last"), tmp_path / "model", platforms=["tpu"])
    with pytest.raises(UserError, match="is for tpu, and JAX computes on cpu here"):
        Exported(tmp_path / "model")


def test_a_program_that_this_jax_does_not_load_says_which_would(copy, monkeypatch):
    window = {"written_with_jax": "0.1.2", "months_newer": 6, "weeks_older": 3}
    content = b"not what JAX writes" * 100
    (copy / "model.stablehlo").write_bytes(content)
    files = json.loads((copy / "manifest.json").read_text())["files"]
    files["model.stablehlo"] = stablehlo.checksum(content)
    edited(copy, files=files, window=window, exported="2020-01-02")
    said = r"does not load the program .* written on 2020-01-02 with JAX 0.1.2: .* 6 months older"
    with pytest.raises(UserError, match=said):
        Exported(copy)


def test_a_program_that_does_not_compile_here_says_which_would(exported):
    """As one of a newer StableHLO, which `jax.export` looks into only then."""
    model = Exported(exported)
    garbage = {"mlir_module_serialized": b"ML\xefR no program"}
    model._program = dataclasses.replace(model._program, **garbage)
    with pytest.raises(UserError, match=r"does not load the program .* Use such a version"):
        model.logits(np.zeros((1, 32, 32, 3), np.uint8), 1)


@pytest.mark.parametrize(
    "words", [["--split", "test"], ["x.png", "--checkpoint", "best"], ["x.png", "--data-dir", "."]]
)
def test_what_is_of_a_run_is_refused_with_a_model(exported, words):
    with pytest.raises(UserError, match="are of a run: give its folder with --workdir"):
        main.main(["predict", "--model", str(exported), *words])


def test_an_image_that_cannot_be_read_is_an_error_and_no_end(exported, capsys):
    assert main.main(["predict", "--model", str(exported), "missing.png"]) == 1
    assert "missing.png cannot be read" in capsys.readouterr().err


def test_the_weights_are_no_part_of_the_program(run):
    """It is small, whatever the size of the network: shapes are enough to write it."""
    trained = Trained(run, "last")
    like = jax.eval_shape(lambda: (trained.params, trained.batch_stats))
    assert len(export.program(trained.model, *like, (32, 32, 3))) < 50_000
