"""`bnjax fold`: the folder that it writes, and when it writes none."""

import json
import shutil

import numpy as np
import pytest
from small_digits import CONFIG, TINY

from bnjax import errors, main
from bnjax.clinic.folding import plan
from bnjax.commands import fold
from bnjax.train.trained import Trained, check_folded, probe
from bnjax.types import named_leaves


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a small network that was trained for two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    assert main.main(["--config", CONFIG, "--workdir", str(workdir), *TINY]) == 0
    return workdir


def test_predictions_of_the_folded_network_are_those_of_the_run(plain, bnjax, tmp_path):
    code, out, err = bnjax("fold", "--workdir", plain, "--out", tmp_path / "folded")
    assert code == 0, err
    assert "conv0_norm   folded into conv0, which it preceded" in out
    before, after = Trained(plain, "last"), Trained(tmp_path / "folded", "last")
    sizes = [
        sum(leaf.size for leaf in named_leaves([one.params, one.batch_stats]).values())
        for one in (before, after)
    ]
    assert f"{sizes[0]:,} numbers before, {sizes[1]:,} after" in out
    norms = [3, 2, 2, 2 * 11 * 11, 4, 4]  # channels of what goes into each layer, 32x32 images
    assert sizes[0] - sizes[1] == 4 * sum(norms)
    assert not after.batch_stats
    split = ("--split", "test", "--json")
    results = [
        json.loads(bnjax("predict", "--workdir", folder, *split)[1])
        for folder in (plain, tmp_path / "folded")
    ]
    assert results[1]["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
    for one, other in zip(results[0]["predictions"], results[1]["predictions"], strict=True):
        assert list(other["scores"].values()) == pytest.approx(
            list(one["scores"].values()), abs=1e-5
        )
    again = bnjax("fold", "--workdir", tmp_path / "folded")
    assert again[0] == 1
    assert "nothing is written" in again[1]


def test_precise_statistics_of_a_network_that_is_folded_in_part(bnjax, tmp_path):
    run, folded, precise = (tmp_path / name for name in ("run", "folded", "precise"))
    # A maximum lies between the first norm and the layer after it, and two steps of Adam with such
    # a rate make the norm's gains negative.
    pooled = ("--config.model.placement=after", "--config.model.pooling=max")
    pooled += ("--config.optimizer.learning_rate=3.0",)
    assert main.main(["--config", CONFIG, "--workdir", str(run), *TINY, *pooled]) == 0
    code, out, err = bnjax("fold", "--workdir", run, "--out", folded)
    assert code == 0, err
    assert "stays" in out
    words = ("--images", 50, "--out", precise, "--json")
    code, out, err = bnjax("precise", "--workdir", folded, *words)
    assert code == 0, err
    code, predicted, err = bnjax("predict", "--workdir", precise, "--split", "test", "--json")
    assert code == 0, err
    assert json.loads(predicted)["loss"] == pytest.approx(json.loads(out)["precise"]["loss"])
    # With gains above 0 the rest can be folded as well, and what was folded before stays so.
    trained = Trained(folded, "last")
    scale = trained.params["conv0_norm"]["scale"]
    trained.params["conv0_norm"]["scale"] = np.abs(scale)
    whole = plan(trained.network, np.zeros((1, *trained.data.image_shape), np.uint8))
    assert check_folded(trained, whole, None)["difference"] < 1e-5
    trained.write(tmp_path / "whole", whole.network, {}, whole.pairs)
    again = Trained(tmp_path / "whole", "last")
    assert not again.batch_stats
    assert len(again.folded) == len(trained.folded) + 1


def test_a_folder_that_is_not_empty_is_left_alone(plain, bnjax):
    code, _, err = bnjax("fold", "--workdir", plain, "--out", plain)
    assert code == 2
    assert "exists already" in err


def test_a_folded_network_is_not_trained_any_further(plain, bnjax, tmp_path):
    bnjax("fold", "--workdir", plain, "--out", tmp_path / "folded")
    code, _, err = bnjax("--config", CONFIG, "--workdir", tmp_path / "folded", *TINY)
    assert code == 2
    assert "holds a folded network" in err
    (tmp_path / "folded" / "folded.json").write_text('{"pairs": [["conv0_norm"]]}')
    code, _, err = bnjax("predict", "--workdir", tmp_path / "folded", "--split", "test")
    assert code == 2
    assert "folded.json is damaged" in err


def test_logits_that_differ_are_not_written(plain):
    trained = Trained(plain, "last")
    done = plan(trained.network, np.zeros((1, *trained.data.image_shape), np.uint8))
    assert check_folded(trained, done, None)["difference"] < 1e-5
    done.network.params["conv1"]["bias"] += 1e-2
    with pytest.raises(errors.UserError, match=r"differ on 256 images of noise by .* is written"):
        check_folded(trained, done, None)


def test_the_probe_is_of_all_brightnesses_or_of_the_test_split(plain):
    trained = Trained(plain, "last")
    noise, what = probe(trained, None)
    assert what == "256 images of noise"
    means = noise.mean((1, 2, 3))
    assert means.min() < 60
    assert means.max() > 200
    images, what = probe(trained, "")
    assert what == "256 test images"
    np.testing.assert_array_equal(images, trained.dataset(None).test.image[:256])


def test_bfloat16_is_checked_in_float32(plain, bnjax, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    content = json.loads((plain / "config.json").read_text())
    content["config"]["model"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    code, _, err = bnjax("fold", "--workdir", tmp_path / "run", "--out", tmp_path / "folded")
    assert code == 0, err
    about = json.loads((tmp_path / "folded" / "folded.json").read_text())
    assert about["difference"] < 1e-5 < about["difference_in_bfloat16"]


def test_latencies_are_of_both_networks(plain, bnjax, monkeypatch):
    monkeypatch.setattr(fold, "SECONDS", 0.0)
    code, out, _ = bnjax("fold", "--workdir", plain, "--latency")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if " ms before" in line] == [
        "batch     1",
        "batch    32",
        "batch 1,024",
    ]
