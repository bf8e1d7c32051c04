"""`bnjax fold`: the folder that it writes, and when it writes none."""

import json
import shutil

import jax
import numpy as np
import pytest
from small_digits import CONFIG, TINY

from bnjax import errors, main
from bnjax.clinic.folding import plan
from bnjax.train.trained import Trained, check_folded


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a small network that was trained for two steps."""
    workdir = tmp_path_factory.mktemp("runs") / "plain"
    assert main.main(["--config", CONFIG, "--workdir", str(workdir), *TINY]) == 0
    return workdir


def test_predictions_of_the_folded_network_are_those_of_the_run(plain, bnjax, tmp_path):
    folded = tmp_path / "folded"
    code, out, err = bnjax("fold", "--workdir", plain, "--out", folded)
    assert code == 0, err
    assert "conv0_norm   was before conv0, folded into it" in out
    before, after = Trained(plain, "last").network, Trained(folded, "last").network
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one)) for one in (before, after)]
    assert f"{sizes[0]:,} numbers before, {sizes[1]:,} after" in out
    norms = [3, 2, 2, 2 * 11 * 11, 4, 4]  # channels of what goes into each layer, 32x32 images
    assert sizes[0] - sizes[1] == 4 * sum(norms)
    assert not after.batch_stats
    one, other = (
        json.loads(bnjax("predict", "--workdir", folder, "--split", "test", "--json")[1])
        for folder in (plain, folded)
    )
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for mine, its in zip(one["predictions"], other["predictions"], strict=True):
        assert its["scores"] == pytest.approx(mine["scores"], abs=1e-5)
    code, out, _ = bnjax("fold", "--workdir", folded)
    assert code == 1
    assert "nothing is written" in out
    code, _, err = bnjax("fold", "--workdir", plain, "--out", folded)
    assert code == 2
    assert "exists already" in err
    code, _, err = bnjax("--config", CONFIG, "--workdir", folded, *TINY)
    assert code == 2
    assert "holds a folded network" in err


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


def test_logits_that_differ_are_not_written(plain):
    trained = Trained(plain, "last")
    done = plan(trained.network, np.zeros((1, *trained.data.image_shape), np.uint8))
    assert check_folded(trained, done, None)["difference"] < 1e-5
    done.network.params["conv1"]["bias"] += 1e-2
    with pytest.raises(errors.UserError, match=r"differ on 256 images of noise by .* is written"):
        check_folded(trained, done, None)


def test_bfloat16_is_checked_in_float32(plain, bnjax, tmp_path):
    shutil.copytree(plain, tmp_path / "run")
    content = json.loads((plain / "config.json").read_text())
    content["config"]["model"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    code, _, err = bnjax("fold", "--workdir", tmp_path / "run", "--out", tmp_path / "folded")
    assert code == 0, err
    about = json.loads((tmp_path / "folded" / "folded.json").read_text())
    assert about["difference"] < 1e-5 < about["difference_in_bfloat16"]
