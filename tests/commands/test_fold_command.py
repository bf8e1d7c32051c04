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


def test_a_network_that_is_folded_in_part_predicts_as_the_run(run, bnjax, tmp_path):
    def done(*words):
        code, out, err = bnjax(*words)
        assert code == 0, err
        return out

    def predicted(folder):
        return json.loads(done("predict", "--workdir", folder, "--split", "test", "--json"))

    folded = tmp_path / "folded"
    out = done("fold", "--workdir", run, "--out", folded)
    before, after = Trained(run, "last").network, Trained(folded, "last").network
    assert "conv0_norm   not folded" in out
    assert "conv2_norm   before dense0, folded into it" in out
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one)) for one in (before, after)]
    assert f"{sizes[0]:,} numbers before, {sizes[1]:,} after" in out
    assert 0 < len(after.batch_stats) < len(before.batch_stats)
    one, other = predicted(run), predicted(folded)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for mine, its in zip(one["predictions"], other["predictions"], strict=True):
        assert its["scores"] == pytest.approx(mine["scores"], abs=1e-5)
    # Its statistics can be recomputed, but it can be neither folded nor trained.
    words = ("--images", 50, "--out", tmp_path / "precise", "--json")
    loss = json.loads(done("precise", "--workdir", folded, *words))["precise"]["loss"]
    assert predicted(tmp_path / "precise")["loss"] == pytest.approx(loss)
    code, out, _ = bnjax("fold", "--workdir", folded)
    assert (code, "nothing was written" in out) == (1, True)
    code, _, err = bnjax("--config", CONFIG, "--workdir", folded, *WORDS)
    assert (code, "holds a folded network" in err) == (2, True)


def test_a_folded_network_that_computes_something_else_is_refused(run):
    trained = Trained(run, "last")
    done = plan(trained.network, np.zeros((1, *trained.data.image_shape), np.uint8))
    assert check_folded(trained, done, None)["difference"] < 1e-5
    done.network.params["logits"]["kernel"] *= 1.01
    said = r"on 256 images of noise .* differ from .* was written"
    with pytest.raises(errors.UserError, match=said):
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
