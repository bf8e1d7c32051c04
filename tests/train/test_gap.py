"""The gap and the drift: figures, what of them lies in the run's files, and for which networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from events import read_values

from bnjax.clinic.linen import Network
from bnjax.clinic.statistics import Drift, drift, gap, put
from bnjax.norms import BatchNorm
from bnjax.train.loop import Trainer
from bnjax.train.run import StopRequest
from bnjax.train.rundir import RunWriter, read_lines
from bnjax.train_step import eval_step, init_variables


def config():
    config = synthetic.config(steps=6)
    config.eval.gap_images = 20
    return config


def gaps(folder):
    return [line for line in read_lines(folder / "metrics.jsonl") if line["split"] == "gap"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    synthetic.train(config(), folder)
    return folder


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return BatchNorm(use_running_average=not train, epsilon=1e-2)(x).mean((1, 2))


def test_averages_that_were_never_updated_are_far_off():
    x = np.random.default_rng(0).normal(3, 0.1, (64, 1, 1, 2)).astype(np.float32)
    batch = {"image": x, "label": np.zeros(64, np.int32)}
    params, stats = init_variables(Norm(), jax.random.key(0), x)
    layers = Network(params, stats, Norm()).norms(batch)
    true = put(stats, gap(Network(params, stats, Norm()), batch).seen, layers)
    (found,) = drift(stats, true, layers).values()
    values = x.astype(np.float64)[:, 0, 0]
    mean, var = values.mean(0), values.var(0) + 1e-2
    assert found.mean == pytest.approx(np.sqrt((mean**2 / var).mean()), rel=1e-5)
    assert found.variance == pytest.approx(np.log(1.01 / var).mean(), rel=1e-4)
    assert found.variance > 3  # a stored variance of 1 where 0.01 is right


def test_padding_counts_for_nothing_and_what_is_true_has_no_drift():
    rng = np.random.default_rng(1)
    x, label = rng.normal(1, 2, (9, 2, 2, 2)).astype(np.float32), np.arange(9, dtype=np.int32) % 2
    params, stats = init_variables(Norm(), jax.random.key(0), x)
    padded = {
        "image": np.concatenate([x, np.full((3, 2, 2, 2), np.nan, np.float32)]),
        "label": np.concatenate([label, np.zeros(3, np.int32)]),
        "mask": np.arange(12) < 9,
    }
    compiled, network = jax.jit(gap), Network(params, stats, Norm())
    whole, masked = (compiled(network, b) for b in ({"image": x, "label": label}, padded))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(masked), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    layers = Network(params, stats, Norm()).norms(padded)
    true = put(stats, masked.seen, layers)
    assert drift(true, true, layers) == {"BatchNorm_0": (0.0, 0.0)}
    under_own = eval_step(params, true, padded, model=Norm())
    np.testing.assert_allclose(masked.batch.loss, under_own.loss, rtol=1e-5)
    assert int(masked.stored.count) == int(masked.batch.count) == 9


def test_what_is_not_finite_is_null(tmp_path):
    x = np.ones((4, 1, 1, 1), np.float32)
    params, true = init_variables(Norm(), jax.random.key(0), x)
    layers = Network(params, true, Norm()).norms({"image": x})
    bad = {"BatchNorm_0": {"mean": jnp.array([jnp.inf]), "var": jnp.array([-5.0])}}
    drifts = drift(bad, true, layers)
    means = {"loss": np.nan, "accuracy": 0.0, "batch_loss": np.inf, "batch_accuracy": 0.0}
    of_norms = {
        f"drift_{of}": {name: getattr(one, of) for name, one in drifts.items()}
        for of in Drift._fields
    }
    with RunWriter(tmp_path, start=0) as writer:
        writer.metrics(1, "gap", means | of_norms)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert (line["loss"], line["batch_loss"]) == (None, None)
    assert line["drift_mean"] == line["drift_variance"] == {"BatchNorm_0": None}


def test_tensorboard_gets_the_same_numbers(finished):
    values = read_values(finished / "tensorboard")
    assert [line["step"] for line in gaps(finished)] == [5, 6]
    for number, line in enumerate(gaps(finished)):
        keys = ("loss", "accuracy", "batch_loss", "batch_accuracy")
        wanted = {f"gap/{key}": line[key] for key in keys}
        for of in ("drift_mean", "drift_variance"):
            assert len(line[of]) == 3
            wanted |= {f"{of}/{name}": value for name, value in line[of].items()}
        for tag, value in wanted.items():
            step, found = values[tag][number]
            assert (step, found.simple_value) == (line["step"], pytest.approx(value))


@pytest.mark.slow
def test_several_seeds_in_one_program(finished, tmp_path):
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    with StopRequest() as stop:
        Trainer(config(), synthetic.dataset()).train(folders, stop)
    mine, its = (gaps(folder)[0] for folder in (folders[0], finished))
    assert mine["batch_loss"] == pytest.approx(its["batch_loss"], rel=1e-3)
    assert mine["drift_mean"] == pytest.approx(its["drift_mean"], rel=1e-2)
    assert gaps(folders[1])[0]["drift_mean"] != pytest.approx(mine["drift_mean"], rel=0.05)


def test_a_network_without_running_statistics_has_no_gap(tmp_path):
    plain = config()
    plain.model.norm, plain.train.steps = "layer", 1
    synthetic.train(plain, tmp_path / "run")
    assert gaps(tmp_path / "run") == []
