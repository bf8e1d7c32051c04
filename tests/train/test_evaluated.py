"""What evaluation uses beside training's own weights and averages, and what is said of these."""

import dataclasses
import functools
import signal

import jax
import numpy as np
import pytest
import synthetic

from bnjax.clinic.statistics import precise
from bnjax.data.batches import evenly_spaced
from bnjax.train import build
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.loop import Stopped, Trainer
from bnjax.train.run import StopRequest
from bnjax.train.rundir import read_lines
from bnjax.train.steps import Steps, default_feed, precise_batches
from bnjax.train.trained import Trained
from bnjax.train_step import forward, init_state, softmax_cross_entropy
from bnjax.types import named_leaves

DATA = synthetic.dataset()


def config(**changes):
    config = synthetic.config(steps=10)
    for key, value in changes.items():
        section, _, name = key.partition("__")
        config[section][name] = value
    return config


def trained(workdir, config):
    """What the checkpoint holds for evaluation, and what training goes on with."""
    synthetic.train(config, workdir)
    run, experiment = Trained(workdir, "last"), build.experiment(config, DATA)
    init = functools.partial(init_state, experiment.model, experiment.tx)
    like = jax.eval_shape(init, jax.random.key(0), DATA.train.image[:1])
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return run, checkpoints.restore(run.step, like, apart=experiment.is_apart)


def lines(workdir, split):
    return [one for one in read_lines(workdir / "metrics.jsonl") if one["split"] == split]


def loss_of(model, params, batch_stats, split, **options):
    logits, _ = forward(
        params, batch_stats, {"image": split.image}, model=model, train=False, **options
    )
    return float(softmax_cross_entropy(logits, split.label).mean())


def same(mine, its):
    jax.tree.map(np.testing.assert_array_equal, mine, its)


def close(mine, its):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-6), mine, its)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("usual") / "run", config(eval__gap_images=16))


def test_the_gap_is_of_the_same_images_twice(usual):
    run, _ = usual
    (_, last) = lines(run.workdir, "gap")
    images = evenly_spaced(DATA.train, 16)
    assert (last["step"], last["count"]) == (10, 16)
    stored = loss_of(run.model, run.params, run.batch_stats, images)
    assert last["loss"] == pytest.approx(stored, rel=1e-5)
    # By the definition: training without dropped units, which normalises by the batch.
    quiet = run.model.clone(dropout=(0.0,))
    logits, _ = forward(
        run.params, run.batch_stats, {"image": images.image}, model=quiet, train=True
    )
    by_batch = float(softmax_cross_entropy(logits, images.label).mean())
    assert last["batch_loss"] == pytest.approx(by_batch, rel=1e-5)
    assert last["batch_loss"] != last["loss"]


def test_drift_of_the_first_norm_is_known_from_the_pixels(usual):
    run, _ = usual
    last = lines(run.workdir, "gap")[-1]
    x = evenly_spaced(DATA.train, 16).image / 255.0
    stats, epsilon = named_leaves(run.batch_stats), run.config.model.epsilon
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2)) + epsilon
    off = (np.asarray(stats["conv0_norm.mean"], np.float64) - mean) / np.sqrt(var)
    assert last["drift_mean"]["conv0_norm"] == pytest.approx(np.sqrt((off**2).mean()), rel=1e-4)
    ratio = np.log((np.asarray(stats["conv0_norm.var"], np.float64) + epsilon) / var)
    assert last["drift_variance"]["conv0_norm"] == pytest.approx(ratio.mean(), rel=1e-4)
    assert list(last["drift_mean"]) == ["conv0_norm", "dense0_norm", "logits_norm"]


def precise_of(run, params, images):
    """The precise statistics of some weights of a run, of two batches of ten images."""
    network = dataclasses.replace(run.network, params=params)
    return precise(network, [{"image": images[:10]}, {"image": images[10:]}]).batch_stats


@pytest.fixture(scope="module")
def with_precise(tmp_path_factory):
    chosen = config(eval__statistics="precise", eval__precise_images=20)
    return trained(tmp_path_factory.mktemp("precise") / "run", chosen)


def test_precise_statistics_are_evaluated_and_training_keeps_its_own(usual, with_precise):
    run, (state, stats) = with_precise
    _, (other, others) = usual
    same((state.params, stats), (other.params, others))  # training is not touched
    images = evenly_spaced(DATA.train, 20).image
    truth = precise_of(run, state.params, images)
    close(run.batch_stats, truth)
    test = lines(run.workdir, "test")[-1]
    assert test["loss"] == pytest.approx(loss_of(run.model, run.params, truth, DATA.test), rel=1e-4)


def test_a_run_with_both_goes_on_bit_for_bit(tmp_path):
    chosen = config(optimizer__average="ema", eval__precise_images=20)

    def interrupting(step, item):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
        return item

    with pytest.raises(Stopped):
        synthetic.train(chosen, tmp_path / "stopped", each=interrupting)
    synthetic.train(chosen, tmp_path / "stopped")
    synthetic.train(chosen, tmp_path / "whole")
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("stopped", "whole")]
    assert files[0] == files[1]


def test_swa_is_of_the_steps_that_the_keys_say_under_statistics_of_its_own(usual, tmp_path):
    chosen = config(optimizer__average="swa", eval__precise_images=20)
    chosen.optimizer.average_start, chosen.optimizer.average_every = 4, 3
    run, (state, _) = trained(tmp_path / "run", chosen)
    close(state.params, usual[1][0].params)  # another program: its roundings are others
    experiment, weights = build.experiment(config(), DATA), []
    steps = Steps(experiment, DATA, default_feed(experiment, DATA.train))
    (state, stats, bad_steps), items = steps.join([steps.init(0)], [0]), steps.feed.items(0, 0)
    for _ in range(10):
        state, stats, bad_steps, _ = steps.train(state, stats, bad_steps, [(next(items),)])
        weights.append(jax.device_get(state.params))
    chosen_ones = [weights[step - 1] for step in (4, 7, 10)]
    close(run.params, jax.tree.map(lambda *leaves: np.mean(leaves, 0), *chosen_ones))
    close(run.batch_stats, precise_of(run, run.params, evenly_spaced(DATA.train, 20).image))


@pytest.mark.slow
def test_several_seeds_in_one_program(tmp_path):
    chosen = config(optimizer__average="swa", eval__precise_images=20)
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    with StopRequest() as stop:
        Trainer(chosen, DATA).train(folders, stop)
    tested = {seed: lines(folder, "test")[-1]["loss"] for seed, folder in folders.items()}
    assert tested[0] != pytest.approx(tested[1], rel=1e-2)
    images = evenly_spaced(DATA.train, 20).image
    for seed, folder in folders.items():
        run = Trained(folder, "last")
        truth = precise_of(run, run.params, images)
        close(run.batch_stats, truth)
        found = loss_of(run.model, run.params, truth, DATA.test)
        assert tested[seed] == pytest.approx(found, rel=1e-4)


def test_a_network_without_running_statistics_can_be_averaged(tmp_path):
    plain = config(optimizer__average="ema", model__norm="none", train__steps=2)
    run, _ = trained(tmp_path / "run", plain)
    found = loss_of(run.model, run.params, {}, DATA.test)
    assert lines(run.workdir, "test")[-1]["loss"] == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize(
    ("images", "sizes"),
    [(25, [9, 9, 7]), (20, [10, 10]), (7, [7]), (100, [10, 10, 10, 10, 8])],
)
def test_batches_for_the_statistics_are_as_alike_as_can_be(images, sizes):
    chosen = config(eval__statistics="precise", eval__precise_images=images)
    made = build.experiment(chosen, DATA)
    batches = precise_batches(DATA.train, made.precise_images, made.batch_size)
    whole = [batch.get("mask", np.ones(len(batch["label"]))).sum() for batch in batches]
    assert whole == sizes


def test_that_averages_are_not_ready_is_no_trouble_where_they_are_not_used():
    slow = {"model__momentum": 0.99}
    assert "not be ready" in build.experiment(config(**slow), DATA).warnings[0]
    assert build.experiment(config(**slow, eval__statistics="precise"), DATA).warnings == ()
