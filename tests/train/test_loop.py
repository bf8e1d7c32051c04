"""A run's folder, and that stopping and going on changes nothing in it."""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import synthetic

from bnjax.data.feed import resident_feed
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, records, tensorboard
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.loop import Stopped, Trainer
from bnjax.train.records import read_lines
from bnjax.train.run import StopRequest
from bnjax.train_step import init_state

SLOW = pytest.mark.slow


def restore(workdir, config):
    experiment = build.experiment(config, synthetic.dataset())
    like = jax.eval_shape(
        lambda: init_state(
            experiment.model, experiment.tx, jax.random.key(0), synthetic.dataset().train.image[:1]
        )
    )
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state, stats = checkpoints.restore(checkpoints.step("last"), like)
    return state.params, state.opt_state, state.step, jax.random.key_data(state.rng), stats


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, synthetic.train(synthetic.config(), workdir)


def test_every_step_and_every_evaluation_is_written(finished):
    workdir, _ = finished
    lines = read_lines(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, 13))
    tests = [line for line in lines if line["split"] == "test"]
    assert [(line["step"], line["count"]) for line in tests] == [(5, 20), (10, 20), (12, 20)]
    assert {key for line in lines for key in line} == {
        "step",
        "split",
        "loss",
        "accuracy",
        "count",
    }  # nothing of the clock
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
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "bnjax"} == set(
        summary["versions"]
    )


def test_it_learns(finished):
    assert finished[1]["final_test"]["accuracy"] > 0.8  # 0.33 by chance


def test_the_newest_two_and_the_best_checkpoint_stay(finished):
    workdir, summary = finished
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert set(checkpoints.steps()) == {10, 12, summary["best_test"]["step"]}
        accuracies = {
            line["step"]: line["accuracy"]
            for line in read_lines(workdir / "metrics.jsonl")
            if line["split"] == "test"
        }
        assert accuracies[checkpoints.step("best")] == max(accuracies.values())


@pytest.mark.parametrize(
    "stop_in", [pytest.param(2, marks=SLOW), 5, 7, pytest.param(11, marks=SLOW)]
)
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, stop_in):
    workdir = tmp_path / "stopped"

    def interrupting(step, item):
        if step == stop_in:
            signal.raise_signal(signal.SIGINT)
        return item

    with pytest.raises(Stopped) as stopped:
        synthetic.train(synthetic.config(), workdir, each=interrupting)
    assert stopped.value.step == stop_in
    assert not (workdir / "summary.json").exists()
    synthetic.train(synthetic.config(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()
    jax.tree.map(
        np.testing.assert_array_equal,
        restore(workdir, synthetic.config()),
        restore(finished[0], synthetic.config()),
    )


def test_lines_written_after_the_last_checkpoint_come_again_once(finished, tmp_path):
    """As after a crash: the process dies in step 8, the newest checkpoint is of step 5."""
    workdir = tmp_path / "crashed"
    with pytest.raises(StopIteration):
        synthetic.train(synthetic.config(), workdir, first=7)
    assert read_lines(workdir / "metrics.jsonl")[-1]["step"] > 5
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "los')  # torn
    synthetic.train(synthetic.config(), workdir)
    assert (workdir / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()


def test_a_folder_of_another_config_is_refused_with_the_difference(finished):
    config = synthetic.config()
    config.model.momentum = 0.9
    with pytest.raises(UserError, match=r"config\.model\.momentum: 0\.75 there, 0\.9 now"):
        synthetic.train(config, finished[0])


def test_another_place_of_the_data_is_no_difference(finished):
    config = synthetic.config()
    config.data.dir = "/elsewhere"
    synthetic.train(config, finished[0])


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        synthetic.train(synthetic.config(), tmp_path)


def test_file_order_sees_the_images_in_their_order(tmp_path):
    seen = []

    def watching(step, item):
        seen.append(item["label"])
        return item

    config = synthetic.config(steps=5)
    config.train.shuffle = False
    synthetic.train(config, tmp_path / "run", each=watching)
    label = synthetic.dataset().train.label
    np.testing.assert_array_equal(np.concatenate(seen)[:50], np.concatenate([label, label])[:50])


def test_slow_averages_spoil_the_test_loss_and_are_warned_of(tmp_path, capsys):
    """The tutorial's trap: with 0.99, evaluation still sees mean 0 and variance 1."""
    losses = {}
    for momentum in (0.75, 0.99):
        config = synthetic.config()
        config.model.momentum = momentum
        losses[momentum] = synthetic.train(config, tmp_path / str(momentum))["final_test"]["loss"]
        assert ("starting value" in capsys.readouterr().out) == (
            momentum == 0.99 or 0.75**12 > 0.01
        )
    assert losses[0.99] > 1.5 * losses[0.75]


def poisoned(*steps):
    """Makes items floats, with an infinite pixel in those of the given steps."""

    def batch(step, item):
        image = item["image"].astype(np.float32) / 255
        image[3, 2, 1, 0] = np.inf if step in steps else image[3, 2, 1, 0]
        return item | {"image": image}

    return batch


def test_a_step_that_is_not_finite_stops_the_run_and_says_where(tmp_path):
    config = synthetic.config()
    config.name = "floats"  # compiled on its own
    with pytest.raises(
        NonFiniteError,
        match=r"step 7 gave .* is the image values\. The checkpoint of step 5 is kept",
    ):
        synthetic.train(config, tmp_path / "run", each=poisoned(7))
    assert [
        line["step"]
        for line in read_lines(tmp_path / "run" / "metrics.jsonl")
        if line.get("skipped")
    ] == [7]
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.newest_intact() == (5, [])


def test_steps_that_are_not_finite_are_skipped_where_that_is_wanted(tmp_path):
    config = synthetic.config()
    config.train.on_nonfinite, config.train.most_skipped = "skip", 2
    summary = synthetic.train(config, tmp_path / "run", each=poisoned(3, 4, 8))
    assert summary["skipped_steps"] == 3
    lines = {
        line["step"]: line
        for line in read_lines(tmp_path / "run" / "metrics.jsonl")
        if line["split"] == "train"
    }
    assert [step for step, line in lines.items() if line.get("skipped")] == [3, 4, 8]
    assert lines[3]["loss"] is None
    assert lines[5]["loss"] is not None
    assert all(
        np.isfinite(leaf).all() for leaf in jax.tree.leaves(restore(tmp_path / "run", config))
    )
    config.train.most_skipped = 1
    with pytest.raises(NonFiniteError, match="step 4 and 1 before it"):
        synthetic.train(config, tmp_path / "other", each=poisoned(3, 4, 8))


@pytest.mark.parametrize(
    "key",
    [
        "every_steps",
        pytest.param("every_epochs", marks=SLOW),
        pytest.param("every_minutes", marks=SLOW),
    ],
)
def test_checkpoints_between_evaluations_change_no_result(finished, tmp_path, key):
    """Interrupted in step 8 without a chance to save; step 5 is evaluated, one of 6 to 8 saved."""
    config = synthetic.config()
    config.checkpoint[key] = {"every_steps": 3, "every_epochs": 3 * 10 / 48, "every_minutes": 1e-9}[
        key
    ]
    with pytest.raises(StopIteration):
        synthetic.train(config, tmp_path / "run", first=8)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.newest_intact()[0] == (8 if key == "every_minutes" else 6)
    synthetic.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        finished[0] / "metrics.jsonl"
    ).read_bytes()


def test_a_damaged_newest_checkpoint_is_said_and_the_result_is_the_same(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    with pytest.raises(StopIteration):
        synthetic.train(synthetic.config(), workdir, first=11)
    file = workdir / "checkpoints" / "10" / "variables" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:20])
    synthetic.train(synthetic.config(), workdir)
    assert "Going on from step 5 instead" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_bytes() == (finished[0] / "metrics.jsonl").read_bytes()


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    lock = str(tmp_path / "run" / ".lock")
    code = (
        f"import filelock, time; lock = filelock.FileLock({lock!r}); lock.acquire(); "
        "print('held', flush=True); time.sleep(60)"
    )
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training in"):
            synthetic.train(synthetic.config(), tmp_path / "run")
        other.kill()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_disk_that_fails_is_a_clear_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.RunWriter, "flush", full)
    with pytest.raises(
        UserError, match=r"No space left on device.*goes on from the last checkpoint"
    ):
        synthetic.train(synthetic.config(), tmp_path / "run")


def test_a_disk_that_fills_up_under_tensorboard_is_a_clear_error(tmp_path, monkeypatch):
    written = itertools.count()

    def full(self, event):
        if next(written) > 8:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard.EventsWriter, "write_event", full)
    with pytest.raises(UserError, match="No space left on device"):
        synthetic.train(synthetic.config(), tmp_path / "run")


def test_what_a_full_disk_left_at_the_start_is_no_obstacle(finished, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json.tmp").write_text("{")
    synthetic.train(synthetic.config(), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        finished[0] / "metrics.jsonl"
    ).read_bytes()


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_files_that_lack_steps_before_the_checkpoint_are_not_gone_on_with(finished, tmp_path, name):
    """As after a power cut that the checkpoint survived and the end of the file did not."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()
    lines = (workdir / name).read_text().splitlines(keepends=True)
    (workdir / name).write_text("".join(lines[:7]))
    with pytest.raises(
        UserError, match=rf"{name} ends before step 12, of which there is a checkpoint"
    ):
        synthetic.train(synthetic.config(), workdir)


def test_steps_skipped_in_a_row_are_counted_across_an_interruption(tmp_path):
    """Steps 4 and 5 are skipped, 5 is saved, and the third one in a row is one too many."""
    config = synthetic.config()
    config.train.on_nonfinite, config.train.most_skipped = "skip", 2
    with pytest.raises(StopIteration):
        synthetic.train(config, tmp_path / "run", each=poisoned(4, 5), first=5)
    with pytest.raises(NonFiniteError, match="step 6 and 2 before it"):
        synthetic.train(config, tmp_path / "run", each=poisoned(6))


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(finished, tmp_path):
    synthetic.train(synthetic.config(), tmp_path / "again")
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (
        finished[0] / "metrics.jsonl"
    ).read_bytes()
    config = synthetic.config()
    config.seed = 1
    synthetic.train(config, tmp_path / "other")
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() != (
        finished[0] / "metrics.jsonl"
    ).read_bytes()


def test_a_run_of_many_steps_a_dispatch_is_the_same_run_however_it_was_stopped(finished, tmp_path):
    """As on an accelerator, which takes as many steps at once as fit into half a second."""
    data, last = synthetic.dataset(), None
    feed = resident_feed(data.train, 10, shuffle=True, max_steps=100)
    trainer = Trainer(
        synthetic.config(),
        data,
        dataclasses.replace(feed, items=lambda *at: itertools.islice(feed.items(*at), last)),
    )
    with StopRequest() as stop:
        trainer.train({0: tmp_path / "whole"}, stop)
        last = 8
        with pytest.raises(StopIteration):
            trainer.train({0: tmp_path / "cut"}, stop)
        last = None
        trainer.train({0: tmp_path / "cut"}, stop)
    assert len(read_lines(tmp_path / "whole" / "timing.jsonl")) == 12
    ours, its = (
        [line["loss"] for line in read_lines(workdir / "metrics.jsonl")]
        for workdir in (tmp_path / "whole", finished[0])
    )
    np.testing.assert_allclose(ours, its, rtol=1e-3)
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (
        tmp_path / "whole" / "metrics.jsonl"
    ).read_bytes()


def test_nothing_is_compiled_after_the_first_step_and_the_first_evaluation(tmp_path):
    compiled, events = [], []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))

    def counting(step, item):
        compiled.append(events.count("/jax/core/compile/backend_compile_duration"))
        return item

    config = synthetic.config(steps=16)
    synthetic.train(config, tmp_path / "run", each=counting)
    assert compiled[0] > 0
    assert compiled[1] > compiled[0]  # the step
    assert compiled[4] == compiled[1]
    assert compiled[6] > compiled[4]  # the evaluation after step 5
    assert compiled[15] == compiled[6]


def test_the_checkpoint_says_how_its_statistics_are_to_be_read(finished):
    record = json.loads((finished[0] / "checkpoints" / "12" / "bnjax.json").read_text())
    conventions = {
        "norm": "batch",
        "epsilon": 1e-3,
        "momentum": 0.75,
        "variance": "biased",
        "debias": False,
    }
    assert record["about"]["norm"] == conventions
    assert record["about"]["config"]["seed"] == 0
    assert "jax" in record["about"]["versions"]


def test_a_run_may_stop_at_a_loss(finished, tmp_path):
    losses = [
        line["loss"]
        for line in read_lines(finished[0] / "metrics.jsonl")
        if line["split"] == "train"
    ]
    config = synthetic.config()
    config.train.stop_at_loss = config.train.target_loss = losses[6] + 1e-6
    first = next(
        step for step, loss in enumerate(losses, start=1) if loss <= config.train.stop_at_loss
    )
    summary = synthetic.train(config, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["loss"] for line in lines if line["split"] == "train"] == losses[:first]
    assert lines[-1]["split"] == "test"
    assert (summary["steps"], summary["final_test"]["step"]) == (first, first)
    assert summary["ended"].startswith("training loss at or below")
    assert list(summary["steps_to_loss"].values()) == [first]
    # As after a crash between the last checkpoint and the summary: it goes on to its end, and that
    # is here.
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    (tmp_path / "run" / "summary.json").unlink()
    assert synthetic.train(config, tmp_path / "run")["steps"] == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_loss_to_stop_at_changes_nothing_before_it(finished, tmp_path):
    config = synthetic.config()
    config.train.stop_at_loss = 1e-9
    summary = synthetic.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (
        finished[0] / "metrics.jsonl"
    ).read_bytes()
    assert summary["ended"] == "all steps taken"
