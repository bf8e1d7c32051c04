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
from synthetic import assert_same_metrics, lines

from bnjax.data.feed import resident_feed
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, jsonl, rundir, summary, tensorboard
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.dispatch import default_feed
from bnjax.train.interrupt import Stopped, StopRequest
from bnjax.train.jsonl import read_lines
from bnjax.train.loop import Trainer

SLOW = pytest.mark.slow
DATA = synthetic.dataset()


def newest(workdir):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.newest_intact()[0]


def same_but_for_rounding(folder, other):
    mine, its = (read_lines(of / "metrics.jsonl") for of in (folder, other))
    losses = [[line.pop("loss") for line in lines] for lines in (mine, its)]
    assert mine == its
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, synthetic.train(synthetic.config(), workdir)


def test_every_step_evaluation_and_checkpoint_is_written_and_summed_up(finished):
    workdir, summary = finished
    train, tests = lines(workdir, "train"), lines(workdir, "test")
    timing = read_lines(workdir / "timing.jsonl")
    assert [line["step"] for line in train] == [line["step"] for line in timing] == [*range(1, 13)]
    assert [(line["step"], line["count"]) for line in tests] == [(5, 20), (10, 20), (12, 20)]
    keys = {key for line in train + tests for key in line}
    assert keys == {"step", "split", "loss", "accuracy", "count"}  # nothing of the clock
    assert json.loads((workdir / "summary.json").read_text()) == summary
    accuracies = {line["step"]: line["accuracy"] for line in tests}
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert summary["final_test"]["accuracy"] == accuracies[12] > 0.8  # 0.33 by chance
    assert (summary["best_test"]["step"], summary["ended"]) == (best, "all steps taken")
    reached = next((line["step"] for line in train if line["loss"] <= 0.2), None)
    assert summary["steps_to_loss"] == {"0.2": reached}
    packages = {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "bnjax"}
    assert packages == set(summary["versions"])
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert (set(checkpoints.steps()), checkpoints.step("best")) == ({10, 12, best}, best)
        about = checkpoints.about(12)
    assert (about["config"]["seed"], about["versions"]) == (0, summary["versions"])


@pytest.mark.parametrize(
    ("checkpoint", "ends", "saved"),
    [
        pytest.param({}, {"each": synthetic.interrupting(2)}, 2, marks=SLOW),
        pytest.param({}, {"each": synthetic.interrupting(5)}, 5, marks=SLOW),
        ({}, {"each": synthetic.interrupting(7)}, 7),
        # Killed in step 9; step 5 is evaluated, one of 6 to 8 saved.
        ({"every_steps": 3}, {"first": 8}, 6),
        pytest.param({"every_epochs": 3 * 10 / 48}, {"first": 8}, 6, marks=SLOW),
        pytest.param({"every_minutes": 1e-9}, {"first": 8}, 8, marks=SLOW),
    ],
)
def test_a_run_goes_on_bit_for_bit_from_its_last_checkpoint(
    finished, tmp_path, checkpoint, ends, saved
):
    config = synthetic.config()
    config.checkpoint.update(checkpoint)
    with pytest.raises((Stopped, StopIteration)) as ended:
        synthetic.train(config, tmp_path, **ends)
    assert getattr(ended.value, "step", saved) == newest(tmp_path) == saved
    assert not (tmp_path / "summary.json").exists()
    synthetic.train(config, tmp_path)
    assert_same_metrics(tmp_path, finished[0])
    ours, its = (synthetic.restored(of, config) for of in (tmp_path, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, its)


def test_after_a_crash_and_damage_the_result_is_the_same(finished, tmp_path, capsys):
    """The process dies in step 12; the newest checkpoint, of step 10, and a file are damaged."""
    with pytest.raises(StopIteration):
        synthetic.train(synthetic.config(), tmp_path, first=11)
    assert lines(tmp_path, "train")[-1]["step"] > 5
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')  # torn
    file = tmp_path / "checkpoints" / "10" / "variables" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:20])
    synthetic.train(synthetic.config(), tmp_path)
    assert "Resuming from step 5 instead" in capsys.readouterr().out
    assert_same_metrics(tmp_path, finished[0])
    synthetic.restored(tmp_path, synthetic.config(), 10)  # saved again


def test_a_run_of_many_steps_a_dispatch_is_the_same_run_however_it_was_stopped(finished, tmp_path):
    """As on an accelerator, which takes as many steps at once as fit into half a second."""
    last, (whole, cut) = None, (tmp_path / "whole", tmp_path / "cut")
    feed = resident_feed(DATA.train, 10, shuffle=True, max_steps=100)
    some = dataclasses.replace(feed, items=lambda *at: itertools.islice(feed.items(*at), last))
    trainer = Trainer(synthetic.config(), DATA, some)
    with StopRequest() as stop:
        trainer.train({0: whole}, stop)
        last = 8
        with pytest.raises(StopIteration):
            trainer.train({0: cut}, stop)
        last = None
        trainer.train({0: cut}, stop)
    assert len(read_lines(whole / "timing.jsonl")) == 12
    same_but_for_rounding(whole, finished[0])
    assert_same_metrics(cut, whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_files_that_lack_steps_before_the_checkpoint_are_not_gone_on_with(finished, tmp_path, name):
    """As after a power cut that the checkpoint survived and the end of the file did not."""
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    (workdir / "summary.json").unlink()
    content = (workdir / name).read_text().splitlines(keepends=True)
    (workdir / name).write_text("".join(content[:7]))
    with pytest.raises(UserError, match=rf"{name} ends before step 12, which has a check"):
        synthetic.train(synthetic.config(), workdir)


def test_a_folder_of_another_run_is_refused(finished, tmp_path):
    config = synthetic.config()
    config.data.dir = "/elsewhere"  # is no difference
    synthetic.train(config, finished[0])
    config.model.momentum = 0.9
    with pytest.raises(UserError, match=r":\n    config\.model\.momentum: 0\.75 there, 0\.9 now\n"):
        synthetic.train(config, finished[0])
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        synthetic.train(config, tmp_path)


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    code = f"import filelock; lock = filelock.FileLock({str(tmp_path / '.lock')!r}); "
    code += "lock.acquire(); print('held', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training in"):
            synthetic.train(synthetic.config(), tmp_path)
        other.kill()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


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


@pytest.mark.parametrize("content", ["{\n", '{"loss": 1.0}\n', "\x80\n"])
def test_a_damaged_file_is_one_sentence(tmp_path, content):
    for name in ("metrics.jsonl", "config.json"):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"metrics.jsonl is damaged"):
        read_lines(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"config.json is damaged"):
        rundir.read(tmp_path)


def test_the_revision_is_that_of_a_repository_which_tracks_the_package(tmp_path):
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for name in ("other", "bnjax"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    for name in ("other", "bnjax"):
        assert summary._git_revision(tmp_path / "bnjax") is None
        for words in (["init"], ["add", name], ["commit", "-m", name]):
            subprocess.run([*git, *words], check=True, capture_output=True)
    assert summary._git_revision(tmp_path / "bnjax")
    assert summary._git_revision(tmp_path / "nowhere") is None


def test_file_order_sees_the_images_in_their_order():
    config = synthetic.config()
    config.train.shuffle = False
    items = default_feed(build.experiment(config, DATA), DATA.train).items(0, 0)
    labels = [item["label"] for item in itertools.islice(items, 10)]
    np.testing.assert_array_equal(np.concatenate(labels)[:96], np.tile(DATA.train.label, 2))


def test_slow_averages_spoil_the_test_loss_and_are_warned_of(finished, tmp_path, capsys):
    """The tutorial's trap: with 0.99, evaluation still sees mean 0 and variance 1."""
    config = synthetic.config()
    config.model.momentum = 0.99
    slow = synthetic.train(config, tmp_path)["final_test"]["loss"]
    assert "initial values" in capsys.readouterr().out
    assert slow > 1.5 * finished[1]["final_test"]["loss"]


def test_a_seed_may_break_down_and_each_goes_on_from_where_it_stands(finished, tmp_path):
    """In one program, as if each were alone; another checkpoint is gone as after a kill."""
    config, folders = synthetic.config(), {seed: tmp_path / str(seed) for seed in (0, 1)}
    both = synthetic.train_seeds(config, folders, each=synthetic.bad_in(7, of=1))
    assert (both[0]["final_test"]["step"], both[0]["skipped_steps"]) == (12, 0)
    same_but_for_rounding(folders[0], finished[0])
    assert isinstance(both[1], NonFiniteError)
    assert str(both[1]).startswith("step 7 gave ")
    assert "is in the losses. The checkpoint of step 5 is kept" in str(both[1])
    assert [line.get("skipped", 0) for line in lines(folders[1], "train")] == [0] * 6 + [1]
    (folders[0] / "summary.json").unlink()
    shutil.rmtree(folders[0] / "checkpoints" / "12")
    assert [newest(run) for run in folders.values()] == [10, 5]
    found = synthetic.train_seeds(config, folders)
    assert [summary["steps"] for summary in found.values()] == [12, 12]
    config.seed = 1
    synthetic.train(config, tmp_path / "alone")
    for run, alone in ((folders[0], finished[0]), (folders[1], tmp_path / "alone")):
        same_but_for_rounding(run, alone)


def test_bad_steps_may_be_skipped_and_those_in_a_row_are_counted_across_an_interruption(tmp_path):
    """Steps 3 and 5 are skipped and saved; a second one in a row is one too many."""
    config = synthetic.config()
    config.train.on_nonfinite, config.train.most_skipped = "skip", 1
    with pytest.raises(StopIteration):
        synthetic.train(config, tmp_path, each=synthetic.bad_in(3, 5), first=5)
    with pytest.raises(NonFiniteError, match="step 6 and 1 before it"):
        synthetic.train(config, tmp_path, each=synthetic.bad_in(6))
    assert synthetic.train(config, tmp_path)["skipped_steps"] == 2
    skipped = {line["step"]: "skipped" in line for line in lines(tmp_path, "train")}
    nothing = {line["step"]: line["loss"] is None for line in lines(tmp_path, "train")}
    assert skipped == nothing == {step: step in (3, 5) for step in range(1, 13)}
    leaves = jax.tree.leaves(synthetic.restored(tmp_path, config))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_only_the_first_step_and_evaluation_compile_and_no_seconds_of_it_count(
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

    synthetic.train(synthetic.config(steps=16), tmp_path, each=counting)
    # The initial values, the step, and the evaluation after step 5.
    assert 0 < compiled[0] < compiled[1] == compiled[4] < compiled[6] == compiled[15]
    assert "s, not included in the training time" in capsys.readouterr().out
    assert read_lines(tmp_path / "timing.jsonl")[4]["seconds"] < 1.2


def test_each_seed_may_stop_at_a_loss(finished, tmp_path):
    losses = [line["loss"] for line in lines(finished[0], "train")]
    config, folders = synthetic.config(), {seed: tmp_path / str(seed) for seed in (0, 1)}
    config.train.stop_at_loss = config.train.target_loss = losses[6] + 1e-3
    first = next(step for step, loss in enumerate(losses, 1) if loss <= config.train.stop_at_loss)
    found = synthetic.train_seeds(config, folders)
    assert found[0]["steps"] == first != found[1]["steps"]
    assert found[0]["ended"].startswith("training loss at or below")
    assert list(found[0]["steps_to_loss"].values()) == [first]
    mine = [line["loss"] for line in lines(folders[0], "train")]
    np.testing.assert_allclose(mine, losses[:first], rtol=1e-3)
    for seed, folder in folders.items():
        last = read_lines(folder / "metrics.jsonl")[-1]
        assert (last["step"], last["split"]) == (newest(folder), "test")
        assert newest(folder) == found[seed]["steps"]
    # As after a crash between the last checkpoint and the summary: nothing is left to train.
    shutil.copytree(folders[0], tmp_path / "before")
    (folders[0] / "summary.json").unlink()
    assert synthetic.train(config, folders[0])["steps"] == first
    assert_same_metrics(folders[0], tmp_path / "before")
