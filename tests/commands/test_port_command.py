"""`bnjax port`: a run's weights in another framework's file, and a run that is made of one."""

import contextlib

import jax
import numpy as np
import pytest
import synthetic

from bnjax.clinic import porting
from bnjax.train import build
from bnjax.train.dispatch import default_feed
from bnjax.train.run import Seed
from bnjax.train.steps import Steps
from bnjax.train.trained import Trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run: a convolution, a hidden layer, three norms before the layers."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    synthetic.train(synthetic.config(6), workdir)
    return workdir


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_there_and_back_is_the_same_network(run, bnjax, tmp_path, framework):
    file, probe, new = (tmp_path / name for name in ("net.safetensors", "p.safetensors", "new"))
    code, out, err = bnjax("port", "--workdir", run, "--to", framework, file, "--probe", probe)
    assert code == 0, err
    assert (
        f"norms in {framework}: epsilon 0.001, momentum 0.{25 if framework == 'torch' else 75}"
        in out
    )
    back = ("port", "--workdir", run, "--from", framework, file, "--out", new)
    code, out, err = bnjax(*back, "--probe", probe)
    assert code == 0, err
    assert "the logits of 8 images differ by at most 0.0e+00" in out
    before, after = Trained(run, "last"), Trained(new, "last")
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.batch_stats, after.batch_stats)
    assert after.step == 0
    assert after.config.model.momentum == before.config.model.momentum
    assert after.config.model.variance == porting.STORED[framework]
    code, _, err = bnjax(*back)
    assert code == 2
    assert "already holds a run" in err


def test_ported_averages_are_not_taken_for_fresh_ones(healthy, bnjax, tmp_path):
    file, new = tmp_path / "net.safetensors", tmp_path / "new"
    bnjax("port", "--workdir", healthy, "--to", "torch", file)
    bnjax("port", "--workdir", healthy, "--from", "torch", file, "--out", new)
    _, out, _ = bnjax("audit", "--workdir", new)
    assert "conv0_norm" in out
    assert "not-converged:" not in out


def test_training_goes_on_with_the_weights(run, bnjax, tmp_path):
    file, new = tmp_path / "net.safetensors", tmp_path / "new"
    bnjax("port", "--workdir", run, "--to", "keras", file)
    bnjax("port", "--workdir", run, "--from", "keras", file, "--out", new)
    config, data = synthetic.config(6), synthetic.dataset()
    experiment = build.experiment(config, data)
    steps = Steps(experiment, data, default_feed(experiment, data.train))
    given = Trained(run, "last")
    with contextlib.ExitStack() as stack:
        state, batch_stats = Seed(config, new, experiment, data, None, stack).restore(steps)
    jax.tree.map(np.testing.assert_array_equal, state.params, given.params)
    jax.tree.map(np.testing.assert_array_equal, batch_stats, given.batch_stats)


def test_the_network_in_torchs_layout(run, bnjax, tmp_path):
    """In NumPy: norms before the layers, channels first, a dense layer after flattened images."""
    file, probe = tmp_path / "net.safetensors", tmp_path / "probe.safetensors"
    bnjax("port", "--workdir", run, "--to", "torch", file, "--probe", probe)
    leaf, (x, logits) = porting.read(file), porting.read(probe).values()
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


def test_other_names(run, bnjax, tmp_path):
    table, file, new = tmp_path / "table.json", tmp_path / "net.safetensors", tmp_path / "new"
    table.write_text('{"names": {"conv{i}": "features.{i}", "{layer}": "{layer}"}}')
    code, _, err = bnjax("port", "--workdir", run, "--table", table, "--to", "torch", file)
    assert code == 0, err
    assert "features.0.weight" in porting.read(file)
    code, _, err = bnjax("port", "--workdir", run, "--from", "torch", file, "--out", new)
    assert code == 2
    assert "Not in this network:\n    features.0.bias" in err
    assert not new.exists()


def test_a_network_that_computes_something_else_leaves_no_run(run, bnjax, tmp_path):
    file, probe, new = (tmp_path / name for name in ("net.safetensors", "p.safetensors", "new"))
    bnjax("port", "--workdir", run, "--to", "torch", file, "--probe", probe)
    good = porting.read(probe)
    off = good["logits"] + 1e-3
    for batch, words in (
        (good | {"logits": off}, "differ by up to 0.001"),
        (good | {"logits": off * np.nan}, "differ by up to nan"),
        (good | {"image": good["image"][:, :, :7]}, r"needs images with the shape [8, 8, 1]"),
        ({"logits": off}, "as `image`"),
    ):
        porting.write(probe, batch)
        code, _, err = bnjax(
            "port", "--workdir", run, "--from", "torch", file, "--out", new, "--probe", probe
        )
        assert code == 2
        assert words in err
        assert not new.exists()


def test_options_that_do_not_go_together(run, bnjax, tmp_path):
    file = tmp_path / "net.safetensors"
    for options, words in (
        (("--from", "torch"), "--out"),
        (("--to", "torch", "--out", tmp_path / "new"), "--to does not"),
        ((), "either --to or --from"),
    ):
        code, _, err = bnjax("port", "--workdir", run, file, *options)
        assert code == 2
        assert words in err
    assert not file.exists()
