"""`bnjax port`: a run's weights in another framework's file, and a run that is made of one."""

import jax
import numpy as np
import pytest
import synthetic

from bnjax.clinic import porting
from bnjax.train.trained import Trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run: a convolution, a hidden layer, three norms before the layers."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    config = synthetic.config(6)
    config.eval.every_steps = 6
    synthetic.train(config, workdir)
    return workdir


@pytest.fixture
def port(run, bnjax, tmp_path):
    """Exports the run, and calls the command on the file."""
    file = tmp_path / "net.safetensors"

    def call(way, framework, *words, workdir=run):
        return bnjax("port", "--workdir", workdir, f"--{way}", framework, file, *words)

    call.file, call.new = file, tmp_path / "new"
    return call


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_there_and_back_is_the_same_network_which_trains_on(run, port, tmp_path, framework):
    probe = ("--probe", tmp_path / "probe.safetensors")
    code, out, err = port("to", framework, *probe)
    assert code == 0, err
    momentum = {"torch": 0.25, "keras": 0.75}[framework]
    assert f"norms in {framework}: epsilon 0.001, momentum {momentum}" in out
    code, out, err = port("from", framework, "--out", port.new, *probe)
    assert code == 0, err
    assert "the logits of 8 images differ by at most 0.0e+00" in out
    before, after = Trained(run, "last"), Trained(port.new, "last")
    jax.tree.map(np.testing.assert_array_equal, before.network.params, after.network.params)
    jax.tree.map(np.testing.assert_array_equal, before.batch_stats, after.batch_stats)
    assert after.step == 0
    assert after.config.model.momentum == before.config.model.momentum
    assert after.config.model.variance == porting.VARIANCE[framework]
    code, _, err = port("from", framework, "--out", port.new)
    assert (code, "already holds a run" in err) == (2, True)
    # Training in the new folder is training from the run's weights.
    synthetic.train(after.config, port.new)
    after.config.train["from"] = str(run)
    synthetic.train(after.config, tmp_path / "from")
    mine, its = (of / "metrics.jsonl" for of in (port.new, tmp_path / "from"))
    assert mine.read_bytes() == its.read_bytes()


def test_ported_averages_are_not_taken_for_fresh_ones(healthy, port, bnjax):
    port("to", "torch", workdir=healthy)
    port("from", "torch", "--out", port.new, workdir=healthy)
    _, out, _ = bnjax("audit", "--workdir", port.new)
    assert "conv0_norm" in out
    assert "not-converged:" not in out


def test_the_network_in_torchs_layout(port, tmp_path):
    """In NumPy: norms before the layers, channels first, a dense layer after flattened images."""
    probe = tmp_path / "probe.safetensors"
    port("to", "torch", "--probe", probe)
    leaf, (x, logits) = porting.read(port.file), porting.read(probe).values()
    assert x.shape == (8, 1, 8, 8)

    def norm(x, name):
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, var, scale, shift = (
            leaf[f"{name}_norm.{of}"].astype(np.float64).reshape(shape)
            for of in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / np.sqrt(var + 1e-3) * scale + shift

    windows = np.lib.stride_tricks.sliding_window_view(norm(x, "conv0"), (3, 3), (2, 3))
    x = np.einsum("nchwij,ocij->nohw", windows[:, :, ::2, ::2], leaf["conv0.weight"])
    x = np.maximum(x + leaf["conv0.bias"].reshape(-1, 1, 1), 0).reshape(len(x), -1)
    for name in ("dense0", "logits"):
        x = norm(x, name) @ leaf[f"{name}.weight"].T + leaf[f"{name}.bias"]
        x = np.maximum(x, 0) if name == "dense0" else x
    np.testing.assert_allclose(x, logits, atol=1e-5)


def test_other_names(port, tmp_path):
    table = tmp_path / "table.json"
    table.write_text('{"names": {"conv{i}": "features.{i}", "{layer}": "{layer}"}}')
    code, _, err = port("to", "torch", "--table", table)
    assert code == 0, err
    assert "features.0.weight" in porting.read(port.file)
    code, _, err = port("from", "torch", "--out", port.new)
    assert code == 2
    assert "Not in this network:\n    features.0.bias" in err
    assert not port.new.exists()


def test_a_network_that_computes_something_else_leaves_no_run(port, tmp_path):
    probe = tmp_path / "probe.safetensors"
    port("to", "torch", "--probe", probe)
    good = porting.read(probe)
    off = good["logits"] + 1e-3
    for batch, words in (
        (good | {"logits": off}, "in the probe batch by up to 0.001"),
        (good | {"logits": off * np.nan}, "in the probe batch by up to nan"),
        (good | {"image": good["image"][:, :, :7]}, r"needs images with the shape [8, 8, 1]"),
        ({"logits": off}, "as `image`"),
    ):
        porting.write(probe, batch)
        code, _, err = port("from", "torch", "--out", port.new, "--probe", probe)
        assert (code, words in err) == (2, True), err
        assert not port.new.exists()
