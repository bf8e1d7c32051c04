"""A run's folder, and that stopping and going on changes nothing in it."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import synthetic

from bnjax.data.feed import resident_feed
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, jsonl, tensorboard
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.jsonl import read_lines
from bnjax.train.loop import Stopped, Trainer
from bnjax.train.run import StopRequest
from bnjax.train_step import init_state

SLOW = pytest.mark.slow
DATA = synthetic.dataset()


def metrics_of(workdir):
    return (workdir / "metrics.jsonl").read_bytes()


def lines_of(workdir, split="train"):
    return [line for line in read_lines(workdir / "metrics.jsonl") if line["split"] == split]


def last_checkpoint(workdir, config):
    experiment = build.experiment(config, DATA)
    like = jax.eval_shape(
        lambda: init_state(experiment.model, experiment.tx, jax.random.key(0), DATA.train.image[:1])
    )
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        state, stats = checkpoints.restore(checkpoints.step("last"), like)
    return state.params, state.opt_state, state.step, jax.random.key_data(state.rng), stats


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, synthetic.train(synthetic.config(), workdir)


def test_every_step_and_every_evaluation_is_written_and_summed_up(finished):
    workdir, summary = finished
    train, tests = lines_of(workdir), lines_of(workdir, "test")
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [(line["step"], line["count"]) for line in tests] == [(5, 20), (10, 20), (12, 20)]
    keys = {key for line in train + tests for key in line}
    assert keys == {"step", "split", "loss", "accuracy", "count"}  # nothing of the clock
    assert [line["step"] for line in read_lines(workdir / "timing.jsonl")] == list(range(1, 13))
    assert list((workdir / "tensorboard").glob("events.*"))
    assert json.loads((workdir / "summary.json").read_text()) == summary
    accuracies = [line["accuracy"] for line in tests]
    assert summary["final_test"]["accuracy"] == accuracies[-1] > 0.8  # 0.33 by chance
    assert summary["best_test"]["accuracy"] == max(accuracies)
    reached = [line["step"] for line in train if line["loss"] <= 0.2]
    assert summary["steps_to_loss"] == {"0.2": reached[0] if reached else None}
    assert summary["ended"] == "all steps taken"
    packages = {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "bnjax"}
    assert packages == set(summary["versions"])


def test_the_newest_two_and_the_best_checkpoint_stay(finished):
    workdir, summary = finished
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert set(checkpoints.steps()) == {10, 12, summary["best_test"]["step"]}
        best = checkpoints.step("best")
    accuracies = {line["step"]: line["accuracy"] for line in lines_of(workdir, "test")}
    assert accuracies[best] == max(accuracies.values())
    about = json.loads((workdir / "checkpoints" / "12" / "bnjax.json").read_text())["about"]
    assert about["config"]["seed"] == 0
    assert "jax" in about["versions"]


@pytest.mark.parametrize("stop_in", [pytest.param(2, marks=SLOW), pytest.param(5, marks=SLOW), 7])
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, stop_in):
    workdir, config = tmp_path / "stopped", synthetic.config()
    with pytest.raises(Stopped) as stopped:
        synthetic.train(config, workdir, each=synthetic.interrupting(stop_in))
    assert stopped.value.step == stop_in
    assert not (workdir / "summary.json").exists()
    synthetic.train(config, workdir)
    assert metrics_of(workdir) == metrics_of(finished[0])
    ours, its = (last_checkpoint(of, config) for of in (workdir, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, its)


def test_after_a_crash_and_damage_the_result_is_the_same(finished, tmp_path, capsys):
    """The process dies in step 12; the newest checkpoint, of step 10, and a file are damaged."""
    workdir = tmp_path / "crashed"
    with pytest.raises(StopIteration):
        synthetic.train(synthetic.config(), workdir, first=11)
    assert lines_of(workdir)[-1]["step"] > 5
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')  # torn
    file = workdir / "checkpoints" / "10" / "variables" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:20])
    synthetic.train(synthetic.config(), workdir)
    assert "Resuming from step 5 instead" in capsys.readouterr().out
    assert metrics_of(workdir) == metrics_of(finished[0])


@pytest.mark.parametrize(
    ("key", "value", "saved"),
    [
        ("every_steps", 3, 6),
        pytest.param("every_epochs", 3 * 10 / 48, 6, marks=SLOW),
        pytest.param("every_minutes", 1e-9, 8, marks=SLOW),
    ],
)
def test_checkpoints_between_evaluations_change_no_result(finished, tmp_path, key, value, saved):
    """Interrupted in step 8 without a chance to save; step 5 is evaluated, one of 6 to 8 saved."""
    config = synthetic.config()
    config.checkpoint[key] = value
    with pytest.raises(StopIteration):
        synthetic.train(config, tmp_path / "run", first=8)
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.newest_intact()[0] == saved
    synthetic.train(config, tmp_path / "run")
    assert metrics_of(tmp_path / "run") == metrics_of(finished[0])


def test_a_run_of_many_steps_a_dispatch_is_the_same_run_however_it_was_stopped(finished, tmp_path):
    """As on an accelerator, which takes as many steps at once as fit into half a second."""
    last = None
    feed = resident_feed(DATA.train, 10, shuffle=True, max_steps=100)
    cut = dataclasses.replace(feed, items=lambda *at: itertools.islice(feed.items(*at), last))
    trainer = Trainer(synthetic.config(), DATA, cut)
    with StopRequest() as stop:
        trainer.train({0: tmp_path / "whole"}, stop)
        last = 8
        with pytest.raises(StopIteration):
            trainer.train({0: tmp_path / "cut"}, stop)
        last = None
        trainer.train({0: tmp_path / "cut"}, stop)
    assert len(read_lines(tmp_path / "whole" / "timing.jsonl")) == 12
    losses = [[line["loss"] for line in lines_of(of)] for of in (tmp_path / "whole", finished[0])]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_files_that_lack_steps_before_the_checkpoint_are_not_gone_on_with(finished, tmp_path, name):
    """As after a power cut that the checkpoint survived and the end of the file did not."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()
    lines = (workdir / name).read_text().splitlines(keepends=True)
    (workdir / name).write_text("".join(lines[:7]))
    with pytest.raises(UserError, match=rf"{name} ends before step 12, which has a check"):
        synthetic.train(synthetic.config(), workdir)


def test_a_folder_of_another_run_is_refused(finished, tmp_path):
    config = synthetic.config()
    config.model.momentum = 0.9
    with pytest.raises(UserError, match=r"config\.model\.momentum: 0\.75 there, 0\.9 now"):
        synthetic.train(config, finished[0])
    config = synthetic.config()
    config.data.dir = "/elsewhere"  # is no difference
    synthetic.train(config, finished[0])
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        synthetic.train(synthetic.config(), tmp_path)


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


@pytest.mark.parametrize(
    ("of", "name", "after"),
    [(jsonl.RunWriter, "flush", 0), (tensorboard.EventsWriter, "write_event", 8)],
)
def test_a_disk_that_fills_up_is_a_clear_error(tmp_path, monkeypatch, of, name, after):
    calls = itertools.count()

    def full(*_):
        if next(calls) >= after:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(of, name, full)
    (tmp_path / "config.json.tmp").write_text("{")  # of an earlier attempt; is no obstacle
    with pytest.raises(UserError, match=r"No space left on device.*resumes training from the last"):
        synthetic.train(synthetic.config(), tmp_path)


def test_file_order_sees_the_images_in_their_order(tmp_path):
    seen = []

    def watching(step, item, seed):
        seen.append(item["label"])
        return item

    config = synthetic.config(steps=5)
    config.train.shuffle = False
    synthetic.train(config, tmp_path / "run", each=watching)
    np.testing.assert_array_equal(np.concatenate(seen)[:50], np.tile(DATA.train.label, 2)[:50])


def test_slow_averages_spoil_the_test_loss_and_are_warned_of(finished, tmp_path, capsys):
    """The tutorial's trap: with 0.99, evaluation still sees mean 0 and variance 1."""
    config = synthetic.config()
    config.model.momentum = 0.99
    slow = synthetic.train(config, tmp_path / "run")["final_test"]["loss"]
    assert "starting value" in capsys.readouterr().out
    assert slow > 1.5 * finished[1]["final_test"]["loss"]


def lenient():
    config = synthetic.config()
    config.train.on_nonfinite, config.train.most_skipped = "skip", 1
    return config


def test_a_step_that_is_not_finite_stops_the_run_and_says_where(tmp_path):
    where = r"step 7 gave .* is in the losses\. The checkpoint of step 5 is kept"
    with pytest.raises(NonFiniteError, match=where):
        synthetic.train(synthetic.config(), tmp_path / "run", each=synthetic.bad_in(7))
    assert [line["step"] for line in lines_of(tmp_path / "run") if "skipped" in line] == [7]
    with Checkpoints(tmp_path / "run" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.newest_intact() == (5, [])


def test_steps_that_are_not_finite_are_skipped_where_that_is_wanted(tmp_path):
    summary = synthetic.train(lenient(), tmp_path / "run", each=synthetic.bad_in(3, 8))
    assert summary["skipped_steps"] == 2
    lines = lines_of(tmp_path / "run")
    assert [line["step"] for line in lines if "skipped" in line] == [3, 8]
    assert [line["loss"] is None for line in lines[2:4]] == [True, False]
    leaves = jax.tree.leaves(last_checkpoint(tmp_path / "run", lenient()))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_bad_steps_in_a_row_are_counted_across_an_interruption(tmp_path):
    """Step 5 is skipped and saved, and the second one in a row is one too many."""
    with pytest.raises(StopIteration):
        synthetic.train(lenient(), tmp_path / "run", each=synthetic.bad_in(5), first=5)
    with pytest.raises(NonFiniteError, match="step 6 and 1 before it"):
        synthetic.train(lenient(), tmp_path / "run", each=synthetic.bad_in(6))


def test_one_of_several_seeds_may_break_down(finished, tmp_path):
    """The other one is trained as if it were alone."""
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    bad = synthetic.bad_in(7, of=1)
    both = synthetic.train_seeds(synthetic.config(), folders, each=bad)
    assert (both[0]["final_test"]["step"], both[0]["skipped_steps"]) == (12, 0)
    assert "step 7 gave" in str(both[1])
    assert "is in the losses" in str(both[1])
    assert [line["step"] for line in lines_of(folders[1])] == list(range(1, 8))
    same_but_for_rounding(folders[0], finished[0])


def same_but_for_rounding(folder, other):
    mine, its = (read_lines(of / "metrics.jsonl") for of in (folder, other))
    assert [{**line, "loss": 0} for line in mine] == [{**line, "loss": 0} for line in its]
    losses = [[line["loss"] for line in lines] for lines in (mine, its)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


def test_seeds_in_one_program_go_on_from_where_each_stands(finished, tmp_path):
    """As after a kill: the newest checkpoint of one run is older than that of the other."""
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    synthetic.train_seeds(synthetic.config(), folders)
    same_but_for_rounding(folders[0], finished[0])
    for seed, run in folders.items():
        shutil.copytree(run, tmp_path / "before" / str(seed))
        (run / "summary.json").unlink()
        shutil.rmtree(run / "checkpoints" / "12")
    shutil.rmtree(folders[1] / "checkpoints")
    found = synthetic.train_seeds(synthetic.config(), folders)
    assert [summary["steps"] for summary in found.values()] == [12, 12]
    for seed, run in folders.items():
        same_but_for_rounding(run, tmp_path / "before" / str(seed))


def test_only_the_first_step_and_the_first_evaluation_compile_and_no_seconds_of_it_count(
    tmp_path, monkeypatch, capsys
):
    def slow_to_trace(logits, label, smoothing):
        time.sleep(1.2)
        return logits.mean(-1)

    monkeypatch.setattr(build, "softmax_cross_entropy", slow_to_trace)
    compiled, events = [], []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))

    def counting(step, item, seed):
        compiled.append(events.count("/jax/core/compile/backend_compile_duration"))
        return item

    synthetic.train(synthetic.config(steps=16), tmp_path / "run", each=counting)
    assert 0 < compiled[0] < compiled[1]  # the initial values, the step
    assert compiled[4] == compiled[1]
    assert compiled[6] > compiled[4]  # the evaluation after step 5
    assert compiled[15] == compiled[6]
    assert "s, not included in the training time" in capsys.readouterr().out
    assert read_lines(tmp_path / "run" / "timing.jsonl")[4]["seconds"] < 1.2


def test_each_seed_may_stop_at_a_loss(finished, tmp_path):
    losses = [line["loss"] for line in lines_of(finished[0])]
    config = synthetic.config()
    config.train.stop_at_loss = config.train.target_loss = losses[6] + 1e-3
    first = next(step for step, loss in enumerate(losses, 1) if loss <= config.train.stop_at_loss)
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    found = synthetic.train_seeds(config, folders)
    assert found[0]["steps"] == first != found[1]["steps"]
    assert found[0]["ended"].startswith("training loss at or below")
    assert list(found[0]["steps_to_loss"].values()) == [first]
    mine = [line["loss"] for line in lines_of(folders[0])]
    np.testing.assert_allclose(mine, losses[:first], rtol=1e-3)
    for seed, folder in folders.items():
        steps, last = found[seed]["steps"], read_lines(folder / "metrics.jsonl")[-1]
        assert (last["step"], last["split"]) == (steps, "test")
        assert (folder / "checkpoints" / str(steps)).is_dir()
    # As after a crash between the last checkpoint and the summary: nothing is left to train.
    before = metrics_of(folders[0])
    (folders[0] / "summary.json").unlink()
    assert synthetic.train(config, folders[0])["steps"] == first
    assert metrics_of(folders[0]) == before
