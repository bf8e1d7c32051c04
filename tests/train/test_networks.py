"""The commands know the other networks: training, audit, fold and port of each."""

import jax
import numpy as np
import pytest
import synthetic

from bnjax import errors, main
from bnjax.clinic import porting
from bnjax.train.config import default_config
from bnjax.train.trained import Trained
from bnjax.train_step import predict_step

DATA = synthetic.dataset()
OWN = {
    "speednet": {"filters": (6,), "use_scale": False, "momentum": 0.2, "whiten_images": 48},
    "resnet20": {"placement": "before", "momentum": 0.2},
}


def config(name):
    config = synthetic.config(steps=8)
    config.model = default_config().model
    config.model.update(name=name, mean=(0.2,), std=(0.3,), **OWN[name])
    config.train.batch_size = 24
    return config


@pytest.fixture(
    scope="module", params=["speednet", pytest.param("resnet20", marks=pytest.mark.slow)]
)
def run(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / request.param
    synthetic.train(config(request.param), workdir)
    return workdir


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setattr(Trained, "dataset", lambda self, data_dir: DATA)

    def call(*words):
        with pytest.raises(SystemExit) as left:
            errors.run(lambda: main.main([*map(str, words)]))
        return left.value.code or 0, capsys.readouterr().out

    return call


def scores(workdir):
    one = Trained(workdir, "last")
    found = predict_step(one.params, one.batch_stats, DATA.test.image, model=one.model)
    return np.asarray(found["score"])


def test_audit_finds_nothing_that_makes_no_sense(run, command):
    code, said = command("audit", "--workdir", run)
    assert code in (0, 1)
    assert "unmatched-leaves" not in said
    assert "missing-statistics" not in said


def test_a_folded_network_says_the_same(run, command, tmp_path):
    code, said = command("fold", "--workdir", run, "--out", tmp_path / "folded")
    assert code == 0
    assert "stays" not in said
    np.testing.assert_allclose(scores(tmp_path / "folded"), scores(run), atol=1e-4)


def test_its_weights_go_to_torch_and_back(run, command, tmp_path):
    file = tmp_path / "net.safetensors"
    code, said = command("port", "--workdir", run, "--to", "torch", file)
    assert code == 0
    assert "standardises pixels: (x - (0.2,)) / (0.3,)" in said
    arrays = porting.read(file)
    if run.name == "resnet20":  # torchvision's names
        assert arrays["layer2.0.conv1.weight"].shape == (32, 16, 3, 3)
        assert "layer3.2.bn2.running_var" in arrays
    else:
        assert arrays["group0_conv0.weight"].shape == (6, 8, 3, 3)
    code, _ = command("port", "--workdir", run, "--from", "torch", file, "--out", tmp_path / "new")
    assert code == 0
    before, after = Trained(run, "last"), Trained(tmp_path / "new", "last")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.batch_stats, after.batch_stats)
