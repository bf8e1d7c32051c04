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

# A maximum lies between the first norm and the layer after it, and two steps of Adam with such a
# rate make the norm's gains negative: it stays.
WORDS = (*TINY, "--config.model.placement=after", "--config.model.pooling=max")
WORDS += ("--config.optimizer.learning_rate=3.0",)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    assert main.main(["--config", CONFIG, "--workdir", str(workdir), *WORDS]) == 0
    return workdir


@pytest.fixture(scope="module")
def folded(run):
    folder = run.with_name("folded")
    assert main.main(["fold", "--workdir", str(run), "--out", str(folder)]) == 0
    return folder


def predicted(bnjax, folder):
    code, out, err = bnjax("predict", "--workdir", folder, "--split", "test", "--json")
    assert code == 0, err
    return json.loads(out)


def test_predictions_of_the_folded_network_are_those_of_the_run(run, folded, bnjax, tmp_path):
    _, out, _ = bnjax("fold", "--workdir", run, "--out", tmp_path / "again")
    before, after = Trained(run, "last").network, Trained(folded, "last").network
    assert "conv0_norm   not folded" in out
    assert "conv2_norm   before dense0, folded into it" in out
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one)) for one in (before, after)]
    assert f"{sizes[0]:,} numbers before, {sizes[1]:,} after" in out
    assert 0 < len(after.batch_stats) < len(before.batch_stats)
    one, other = predicted(bnjax, run), predicted(bnjax, folded)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for mine, its in zip(one["predictions"], other["predictions"], strict=True):
        assert its["scores"] == pytest.approx(mine["scores"], abs=1e-5)


def test_precise_statistics_of_a_network_that_is_folded_in_part(folded, bnjax, tmp_path):
    words = ("--images", 50, "--out", tmp_path / "precise", "--json")
    code, out, err = bnjax("precise", "--workdir", folded, *words)
    assert code == 0, err
    loss = json.loads(out)["precise"]["loss"]
    assert predicted(bnjax, tmp_path / "precise")["loss"] == pytest.approx(loss)


def test_what_writes_nothing(run, folded, bnjax):
    for words, exit_code, said in (
        (("fold", "--workdir", folded), 1, "nothing was written"),
        (("fold", "--workdir", run, "--out", folded), 2, "exists already"),
        (("--config", CONFIG, "--workdir", folded, *WORDS), 2, "holds a folded network"),
    ):
        code, out, err = bnjax(*words)
        assert (code, said in out + err) == (exit_code, True), out + err
    trained = Trained(run, "last")
    done = plan(trained.network, np.zeros((1, *trained.data.image_shape), np.uint8))
    assert check_folded(trained, done, None)["difference"] < 1e-5
    done.network.params["logits"]["kernel"] *= 1.01
    with pytest.raises(
        errors.UserError, match=r"on 256 images of noise .* differ by .* was written"
    ):
        check_folded(trained, done, None)


def test_bfloat16_is_checked_in_float32(run, bnjax, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "config.json").read_text())
    content["config"]["model"]["dtype"] = "bfloat16"
    (tmp_path / "run" / "config.json").write_text(json.dumps(content))
    code, _, err = bnjax("fold", "--workdir", tmp_path / "run", "--out", tmp_path / "folded")
    assert code == 0, err
    about = json.loads((tmp_path / "folded" / "folded.json").read_text())
    assert about["difference"] < 1e-5 < about["difference_in_bfloat16"]
