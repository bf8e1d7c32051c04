"""A run's folder, and that stopping and going on changes nothing in it."""

import itertools
import json
import signal

import jax
import numpy as np
import pytest
import synthetic

from bnjax import config as configs
from bnjax import loop
from bnjax.checkpoint import Checkpoints
from bnjax.errors import UserError
from bnjax.loop import Stopped, train_and_evaluate
from bnjax.train_step import init_state
from bnjax.writers import read_lines


def restore(workdir, config):
    experiment = configs.build(config, synthetic.dataset())
    like = jax.eval_shape(lambda: init_state(experiment.model, experiment.tx, jax.random.key(0), synthetic.dataset().train.image[:1]))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state, stats = checkpoints.restore(checkpoints.step("last"), like)
    return state.params, state.opt_state, state.step, jax.random.key_data(state.rng), stats


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, train_and_evaluate(synthetic.config(), workdir, synthetic.dataset())


def test_every_step_and_every_evaluation_is_written(finished):
    workdir, _ = finished
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 13))
    tests = [line for line in lines if line["split"] == "test"]
    assert [(line["step"], line["count"]) for line in tests] == [(5, 20), (10, 20), (12, 20)]
    assert {key for line in lines for key in line} == {"step", "split", "loss", "accuracy", "count"}  # nothing of the clock
    assert [line["step"] for line in read_lines(workdir / "timing.jsonl")] == list(range(1, 13))
    assert list((workdir / "tensorboard").glob("events.*"))


def test_the_summary_follows_from_the_metrics(finished):
    workdir, summary = finished
    assert json.loads((workdir / "summary.json").read_text()) == summary
    lines = read_lines(workdir / "metrics.jsonl")
    tests = [line for line in lines if line["split"] == "test"]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert summary["final_test"]["accuracy"] == tests[-1]["accuracy"]
    assert summary["best_test"]["accuracy"] == max(line["accuracy"] for line in tests)
    reached = [step for step, loss in enumerate(losses, start=1) if loss <= 0.2]
    assert summary["steps_to_loss"] == {"0.2": reached[0] if reached else None}
    assert summary["official_pixels"] is None
    assert {"python", "jax", "flax", "optax", "orbax-checkpoint", "bnjax"} == set(summary["versions"])


def test_it_learns(finished):
    assert finished[1]["final_test"]["accuracy"] > 0.8  # 0.33 by chance


def test_the_newest_two_and_the_best_checkpoint_stay(finished):
    workdir, summary = finished
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert set(checkpoints.steps()) == {10, 12, summary["best_test"]["step"]}
        accuracies = {line["step"]: line["accuracy"] for line in read_lines(workdir / "metrics.jsonl") if line["split"] == "test"}
        assert accuracies[checkpoints.step("best")] == max(accuracies.values())


@pytest.mark.parametrize("stop_in", [2, 5, 7, 11])
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, monkeypatch, stop_in):
    workdir = tmp_path / "stopped"
    stream = loop.train_batches

    def interrupting(*args, **kwargs):
        for step, batch in enumerate(stream(*args, **kwargs), start=1):
            if step == stop_in:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(loop, "train_batches", interrupting)
    with pytest.raises(Stopped) as stopped:
        train_and_evaluate(synthetic.config(), workdir, synthetic.dataset())
    assert stopped.value.step == stop_in
    assert not (workdir / "summary.json").exists()
    monkeypatch.undo()
    train_and_evaluate(synthetic.config(), workdir, synthetic.dataset())
    assert (workdir / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()
    jax.tree.map(np.testing.assert_array_equal, restore(workdir, synthetic.config()), restore(finished[0], synthetic.config()))


def test_lines_written_after_the_last_checkpoint_come_again_once(finished, tmp_path, monkeypatch):
    """As after a crash: the process dies in step 8, the newest checkpoint is of step 5."""
    workdir = tmp_path / "crashed"
    stream = loop.train_batches
    monkeypatch.setattr(loop, "train_batches", lambda *args, **kwargs: itertools.islice(stream(*args, **kwargs), 7))
    with pytest.raises(StopIteration):
        train_and_evaluate(synthetic.config(), workdir, synthetic.dataset())
    assert read_lines(workdir / "metrics.jsonl")[-1]["step"] > 5
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')  # torn
    monkeypatch.undo()
    train_and_evaluate(synthetic.config(), workdir, synthetic.dataset())
    assert (workdir / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()


def test_a_folder_of_another_config_is_refused_with_the_difference(finished):
    config = synthetic.config()
    config.model.momentum = 0.9
    with pytest.raises(UserError, match=r"config\.model\.momentum: 0\.75 there, 0\.9 now"):
        train_and_evaluate(config, finished[0], synthetic.dataset())


def test_another_place_of_the_data_is_no_difference(finished):
    config = synthetic.config()
    config.data.dir = "/elsewhere"
    train_and_evaluate(config, finished[0], synthetic.dataset())


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        train_and_evaluate(synthetic.config(), tmp_path, synthetic.dataset())


def test_file_order_sees_the_images_in_their_order(tmp_path, monkeypatch):
    seen = []
    stream = loop.train_batches

    def watching(*args, **kwargs):
        for batch in stream(*args, **kwargs):
            seen.append(batch["label"])
            yield batch

    monkeypatch.setattr(loop, "train_batches", watching)
    config = synthetic.config(steps=5)
    config.train.shuffle = False
    train_and_evaluate(config, tmp_path / "run", synthetic.dataset())
    label = synthetic.dataset().train.label
    np.testing.assert_array_equal(np.concatenate(seen)[:50], np.concatenate([label, label])[:50])


def test_slow_averages_spoil_the_test_loss_and_are_warned_of(tmp_path, capsys):
    """The trap that the tutorial fell into first: with 0.99, evaluation still sees mean 0 and variance 1."""
    losses = {}
    for momentum in (0.75, 0.99):
        config = synthetic.config()
        config.model.momentum = momentum
        losses[momentum] = train_and_evaluate(config, tmp_path / str(momentum), synthetic.dataset())["final_test"]["loss"]
        assert ("starting value" in capsys.readouterr().out) == (momentum == 0.99 or 0.75**12 > 0.01)
    assert losses[0.99] > 1.5 * losses[0.75]
