"""What evaluation uses beside training's own weights and averages, and what is said of these."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import synthetic
from synthetic import assert_same_metrics, lines

from bnjax.clinic.statistics import precise
from bnjax.data.batches import evenly_spaced
from bnjax.loss import softmax_cross_entropy
from bnjax.train import build
from bnjax.train.interrupt import Stopped
from bnjax.train.steps import precise_batches
from bnjax.train.trained import Trained
from bnjax.train_step import forward

DATA = synthetic.dataset()


def config(**changes):
    config = synthetic.config(steps=10)
    config.update_from_flattened_dict({key.replace("__", "."): changes[key] for key in changes})
    return config


def trained(workdir, config):
    """What the checkpoint holds for evaluation, and what training goes on with."""
    synthetic.train(config, workdir)
    return Trained(workdir, "last"), synthetic.restored(workdir, config)


@functools.partial(jax.jit, static_argnames="model")
def loss_of(model, params, batch_stats, split_image, label):
    logits, _ = forward(params, batch_stats, {"image": split_image}, model=model, train=False)
    return softmax_cross_entropy(logits, label).mean()


def assert_tested(run, batch_stats):
    """The last test loss is that of the run's parameters under these statistics."""
    wanted = loss_of(run.model, run.params, batch_stats, DATA.test.image, DATA.test.label)
    assert lines(run.workdir, "test")[-1]["loss"] == pytest.approx(float(wanted), rel=1e-4)


def close(mine, its):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), mine, its)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("usual") / "run", config())


def precise_of(run, params):
    """The precise statistics of some weights of a run, of two batches of ten images."""
    images = evenly_spaced(DATA.train, 20).image
    network = dataclasses.replace(run.network, params=params)
    return precise(network, [{"image": images[:10]}, {"image": images[10:]}]).batch_stats


def test_precise_statistics_are_evaluated_and_training_keeps_its_own(usual, tmp_path):
    chosen = config(eval__statistics="precise", eval__precise_images=20)
    run, (state, stats) = trained(tmp_path / "run", chosen)
    _, (other, others) = usual  # training is not touched
    jax.tree.map(np.testing.assert_array_equal, (state.params, stats), (other.params, others))
    truth = precise_of(run, state.params)
    close(run.batch_stats, truth)
    assert_tested(run, truth)


AVERAGED = {"optimizer__average_start": 4, "optimizer__average_every": 3}
AVERAGED |= {"optimizer__average": "swa", "eval__precise_images": 20}


def test_swa_is_of_the_steps_that_the_keys_say_under_statistics_of_its_own(usual, tmp_path):
    swa, stopped = config(**AVERAGED), tmp_path / "stopped"
    run, (state, _) = trained(tmp_path / "run", swa)
    close(state.params, usual[1][0].params)  # another program: its roundings are others
    weights = []
    for step in (4, 7):
        with pytest.raises(Stopped):
            synthetic.train(swa, stopped, each=synthetic.interrupting(step))
        weights.append(synthetic.restored(stopped, swa, step)[0].params)
    close(run.params, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *weights, state.params))
    close(run.batch_stats, precise_of(run, run.params))
    synthetic.train(swa, stopped)  # it goes on bit for bit
    assert_same_metrics(stopped, run.workdir)


@pytest.mark.slow
def test_several_seeds_in_one_program(tmp_path):
    """With averaged weights, statistics of their own and the gap."""
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    synthetic.train_seeds(config(eval__gap_images=20, **AVERAGED), folders)
    drifts = [lines(folder, "gap")[0]["drift_mean"] for folder in folders.values()]
    assert drifts[0] != pytest.approx(drifts[1], rel=0.05)
    for folder in folders.values():
        run = Trained(folder, "last")
        truth = precise_of(run, run.params)
        close(run.batch_stats, truth)
        assert_tested(run, truth)


@pytest.mark.slow
def test_a_network_without_running_statistics_can_be_averaged_and_has_no_gap(tmp_path):
    plain = {"optimizer__average": "ema", "model__norm": "none", "eval__gap_images": 20}
    run, _ = trained(tmp_path / "run", config(train__steps=2, **plain))
    assert_tested(run, {})
    assert lines(run.workdir, "gap") == []


@pytest.mark.parametrize(
    ("images", "sizes"),
    [(25, [9, 9, 7]), (20, [10, 10]), (7, [7]), (100, [10, 10, 10, 10, 8])],
)
def test_batches_for_the_statistics_are_as_alike_as_can_be(images, sizes):
    made = build.experiment(config(eval__statistics="precise", eval__precise_images=images), DATA)
    batches = precise_batches(DATA.train, made.precise_images, made.batch_size)
    whole = [batch.get("mask", np.ones(len(batch["label"]))).sum() for batch in batches]
    assert whole == sizes
