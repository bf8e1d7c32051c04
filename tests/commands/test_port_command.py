"""`bnjax port`: a run's weights in another framework's file, and a run that is made of one."""

import contextlib
import json
import subprocess

import jax
import numpy as np
import pytest
import synthetic

from bnjax import errors, main
from bnjax.clinic import porting
from bnjax.train import build
from bnjax.train.run import Seed
from bnjax.train.steps import Steps, default_feed
from bnjax.train.trained import Trained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run: a convolution, a hidden layer, three norms before the layers."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    synthetic.train(synthetic.config(6), workdir)
    return workdir


@pytest.fixture
def port(capsys):
    def call(*arguments):
        with pytest.raises(SystemExit) as left:
            errors.run(lambda: main.main(["port", *map(str, arguments)]))
        return subprocess.CompletedProcess(arguments, left.value.code or 0, *capsys.readouterr())

    return call


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    jax.tree.map(np.testing.assert_array_equal, one.batch_stats, other.batch_stats)


@pytest.mark.parametrize("framework", ["torch", "keras"])
def test_there_and_back_is_the_same_network(run, port, tmp_path, framework):
    file, probe, new = (
        tmp_path / "net.safetensors",
        tmp_path / "probe.safetensors",
        tmp_path / "new",
    )
    done = port("--workdir", run, "--to", framework, file, "--probe", probe)
    assert done.returncode == 0, done.stderr
    done = port("--workdir", run, "--from", framework, file, "--probe", probe, "--out", new)
    assert done.returncode == 0, done.stderr
    assert "all accounted for" in done.stdout
    assert "the logits of 8 images differ by 0.0e+00 at most" in done.stdout
    before, after = Trained(run, "last"), Trained(new, "last")
    same(before, after)
    assert after.config.model.epsilon == before.config.model.epsilon
    assert after.config.model.momentum == before.config.model.momentum
    assert after.step == (before.step if framework == "torch" else 0)
    assert after.config.model.variance == "biased"  # as the numbers are, which were not converted
    again = port("--workdir", run, "--from", framework, file, "--out", new)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr


def test_training_goes_on_with_weights_of_step_0(run, port, tmp_path):
    file, new = tmp_path / "net.npz", tmp_path / "new"
    port("--workdir", run, "--to", "keras", file)
    port("--workdir", run, "--from", "keras", file, "--out", new)
    config, data = synthetic.config(6), synthetic.dataset()
    experiment = build.experiment(config, data)
    steps = Steps(experiment, data, default_feed(experiment, data.train))
    given = Trained(run, "last")
    with contextlib.ExitStack() as stack:
        state, batch_stats = Seed(config, new, experiment, data, stack).restore(steps)
    jax.tree.map(np.testing.assert_array_equal, state.params, given.params)
    jax.tree.map(np.testing.assert_array_equal, batch_stats, given.batch_stats)


def test_numbers_that_are_not_finite_are_named(run, port, tmp_path):
    file = tmp_path / "net.safetensors"
    port("--workdir", run, "--to", "torch", file)
    arrays, notes = porting.read(file)
    arrays = {name: array.copy() for name, array in arrays.items()}
    arrays["conv0.weight"][0] = np.nan
    arrays["logits_norm.running_var"][1] = np.inf
    porting.write(file, arrays, notes)
    done = port("--workdir", run, "--from", "torch", file, "--out", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "WARNING" in line]
    assert {*line.split(" in ")[1].split(", ")} == {"conv0.weight", "logits_norm.running_var"}


def test_what_torch_is_given(run, port, tmp_path):
    file, probe = tmp_path / "net.safetensors", tmp_path / "probe.safetensors"
    done = port("--workdir", run, "--to", "torch", file, "--probe", probe)
    assert "as they were stored, biased; torch stores unbiased" in done.stdout
    arrays, notes = porting.read(file)
    assert json.loads(notes["norms"]) == {"eps": 1e-3, "momentum": 0.25}
    assert arrays["conv0_norm.num_batches_tracked"] == 6
    images, logits = porting.read(probe)[0].values()
    assert images.shape == (8, 1, 8, 8)
    np.testing.assert_allclose(by_hand(arrays, images.astype(np.float64)), logits, atol=1e-5)


def by_hand(leaf, x):
    """The network above in NumPy, in torch's layout and order."""

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
    return x


def test_what_variances_are_is_as_the_file_says(run, port, tmp_path):
    """Those that torch averaged are unbiased; those that were taken there and back are not."""
    file, foreign = tmp_path / "net.safetensors", tmp_path / "foreign.safetensors"
    port("--workdir", run, "--to", "torch", file)
    arrays, notes = porting.read(file)
    assert notes["variance"] == "biased"
    porting.write(foreign, arrays, {"format": "pt"})  # as torch's users save
    before = Trained(run, "last").batch_stats["conv0_norm"]["var"]
    for name, source, options, variance, factor in (
        ("own", file, (), "biased", 1),
        ("foreign", foreign, (), "unbiased", 1),
        ("own, converted", file, ("--examples", 10), "biased", 1),
        ("foreign, converted", foreign, ("--examples", 10), "biased", 639 / 640),
    ):
        out = ("--out", tmp_path / name)
        done = port("--workdir", run, "--from", "torch", source, *out, *options)
        assert done.returncode == 0, done.stderr
        after = Trained(tmp_path / name, "last")
        assert after.config.model.variance == variance, name
        found = after.batch_stats["conv0_norm"]["var"]
        np.testing.assert_allclose(found, before * factor, rtol=1e-6, err_msg=name)
    porting.write(file, arrays, notes | {"variance": "odd"})
    done = port("--workdir", run, "--from", "torch", file, "--out", tmp_path / "odd")
    assert done.returncode == 2
    assert "are damaged ('odd')" in done.stderr


def test_other_names_and_conventions(run, port, tmp_path):
    table, file, new = tmp_path / "table.json", tmp_path / "net.safetensors", tmp_path / "new"
    table.write_text('{"names": {"conv{i}": "features.{i}", "{layer}": "{layer}"}}')
    options = ("--workdir", run, "--table", table, "--examples", 10)
    done = port(*options, "--to", "torch", file)
    assert done.returncode == 0, done.stderr
    arrays, _ = porting.read(file)
    assert "features.0.weight" in arrays
    before = Trained(run, "last")
    # 10 images of 8x8 pixels.
    np.testing.assert_allclose(
        arrays["features.0_norm.running_var"],
        before.batch_stats["conv0_norm"]["var"] * (640 / 639),
        rtol=1e-6,
    )
    done = port(*options, "--from", "torch", file, "--out", new, "--momentum", 0.1)
    assert done.returncode == 0, done.stderr
    after = Trained(new, "last")
    assert (after.config.model.momentum, after.config.model.variance) == (0.9, "biased")
    np.testing.assert_allclose(
        after.batch_stats["dense0_norm"]["var"], before.batch_stats["dense0_norm"]["var"], rtol=1e-6
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--epsilon", 1e-1], "the logits of the probe batch differ by up to"),
        (["--table", "TABLE"], "There, and not needed here:\n    conv0.bias"),
        (["--probe", "FILE"], "is no probe batch"),
        (["--probe", "EMPTY"], "is no probe batch"),
        (["--examples", 0], "--examples 0 is too few"),
    ],
)
def test_what_is_refused_leaves_no_run(run, port, tmp_path, options, said):
    file, probe, new = (tmp_path / name for name in ("net.safetensors", "p.safetensors", "new"))
    port("--workdir", run, "--to", "torch", file, "--probe", probe)
    (tmp_path / "table.json").write_text('{"names": {"conv{i}": "c{i}", "{layer}": "{layer}"}}')
    empty = tmp_path / "empty.safetensors"
    arrays = {"image": np.zeros((0, 1, 8, 8), np.float32), "logits": np.zeros((0, 3))}
    porting.write(empty, arrays, {})
    places = {"TABLE": tmp_path / "table.json", "FILE": file, "EMPTY": empty}
    options = [places.get(option, option) for option in options]
    files = ("--out", new, "--probe", probe)
    done = port("--workdir", run, "--from", "torch", file, *files, *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert not new.exists()


def test_options_that_do_not_go_together(run, port, tmp_path):
    file = tmp_path / "net.safetensors"
    assert "--out" in port("--workdir", run, "--from", "torch", file).stderr
    done = port("--workdir", run, "--to", "torch", file, "--out", tmp_path / "new")
    assert "are of --from" in done.stderr
    assert not file.exists()


def test_help_says_how_the_other_framework_saves(port):
    done = port("--help")
    assert done.returncode == 0
    assert "save_file(network.state_dict(), FILE)" in " ".join(done.stdout.split())
