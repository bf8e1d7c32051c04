"""The command `bnjax audit`, on runs of real digits."""

import json
import re
import shutil

from digit_runs import STEPS, train

from bnjax.train.trained import Trained


def test_a_healthy_run_exits_with_0(bnjax, healthy):
    code, out, _ = bnjax("audit", "--workdir", healthy, "--images", 512)
    assert code == 0, out
    assert f"checkpoint of step {STEPS}, digits" in out
    assert "healthy: nothing found" in out
    assert "not checked" not in out  # a run's folder knows everything


def test_an_ill_run_exits_with_1_and_says_how_to_mend_it(bnjax, unready, tmp_path):
    arguments = ("audit", "--workdir", unready, "--images", 512)
    code, out, error = bnjax(*arguments, "--json", "--out", tmp_path)
    assert code == 1
    assert f"bnjax precise --workdir {unready}" in bnjax(*arguments)[1]
    content = json.loads(out)
    assert [one["id"] for one in content["findings"]] == ["not-converged"]
    assert (content["step"], content["dataset"], content["examples"]) == (STEPS, "digits", 512)
    assert f"{0.99**STEPS:.1%}" in content["findings"][0]["measured"]
    page = (tmp_path / "audit.html").read_text()
    assert str(tmp_path / "audit.html") in error
    for layer in content["layers"]:
        assert layer["name"] in page
    assert not re.findall(r"""(?:src|href)=["']https?:""", page)  # needs no network


def test_a_checkpoint_says_which_weights_its_statistics_belong_to(bnjax, healthy, tmp_path):
    """The record of another step: as if the weights had been replaced."""
    copy = shutil.copytree(healthy, tmp_path / "copy")
    record = copy / "checkpoints" / str(STEPS) / "bnjax.json"
    content = json.loads(record.read_text())
    assert content["about"]["weights"] == Trained(healthy, "last").weights
    content["about"]["weights"] = Trained(healthy, str(STEPS // 2)).weights
    record.write_text(json.dumps(content))
    found = json.loads(bnjax("audit", "--workdir", copy, "--images", 512, "--json")[1])
    assert [one["id"] for one in found["findings"]] == ["stale"]


def test_a_run_without_batch_norm_is_not_called_healthy(bnjax, tmp_path):
    train(tmp_path, 2, norm="none")
    code, out, _ = bnjax("audit", "--workdir", tmp_path)
    assert code == 2, out
    assert "all other checks: needs a batch norm of Flax, Equinox or bnjax, with" in out
    assert "healthy" not in out
