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
from synthetic import lines

from bnjax.data.feed import resident_feed
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, jsonl, rundir, summary, tensorboard
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.jsonl import read_lines
from bnjax.train.loop import Stopped, Trainer
from bnjax.train.run import StopRequest

SLOW = pytest.mark.slow
DATA = synthetic.dataset()


def metrics_of(workdir):
    return (workdir / "metrics.jsonl").read_bytes()


def newest(workdir):
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.newest_intact()[0]


def same_but_for_rounding(folder, other):
    mine, its = (read_lines(of / "metrics.jsonl") for of in (folder, other))
    assert [{**line, "loss": 0} for line in mine] == [{**line, "loss": 0} for line in its]
    losses = [[line["loss"] for line in lines] for lines in (mine, its)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, synthetic.train(synthetic.config(), workdir)


def test_every_step_evaluation_and_checkpoint_is_written_and_summed_up(finished):
    workdir, summary = finished
    train, tests = lines(workdir, "train"), lines(workdir, "test")
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [(line["step"], line["count"]) for line in tests] == [(5, 20), (10, 20), (12, 20)]
    keys = {key for line in train + tests for key in line}
    assert keys == {"step", "split", "loss", "accuracy", "count"}  # nothing of the clock
    assert [line["step"] for line in read_lines(workdir / "timing.jsonl")] == list(range(1, 13))
    assert json.loads((workdir / "summary.json").read_text()) == summary
    accuracies = {line["step"]: line["accuracy"] for line in tests}
    assert summary["final_test"]["accuracy"] == accuracies[12] > 0.8  # 0.33 by chance
    best = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert summary["best_test"]["step"] == best
    reached = [line["step"] for line in train if line["loss"] <= 0.2]
    assert summary["steps_to_loss"] == {"0.2": reached[0] if reached else None}
    assert summary["ended"] == "all steps taken"
    packages = {"python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "bnjax"}
    assert packages == set(summary["versions"])
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        assert set(checkpoints.steps()) == {10, 12, best}
        assert checkpoints.step("best") == best
        about = checkpoints.about(12)
    assert (about["config"]["seed"], about["versions"]) == (0, summary["versions"])


@pytest.mark.parametrize("stop_in", [pytest.param(2, marks=SLOW), pytest.param(5, marks=SLOW), 7])
def test_a_stopped_run_goes_on_bit_for_bit(finished, tmp_path, stop_in):
    workdir, config = tmp_path / "stopped", synthetic.config()
    with pytest.raises(Stopped) as stopped:
        synthetic.train(config, workdir, each=synthetic.interrupting(stop_in))
    assert stopped.value.step == stop_in
    assert not (workdir / "summary.json").exists()
    synthetic.train(config, workdir)
    assert metrics_of(workdir) == metrics_of(finished[0])
    ours, its = (synthetic.restored(of, config) for of in (workdir, finished[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, its)


def test_after_a_crash_and_damage_the_result_is_the_same(finished, tmp_path, capsys):
    """The process dies in step 12; the newest checkpoint, of step 10, and a file are damaged."""
    workdir = tmp_path / "crashed"
    with pytest.raises(StopIteration):
        synthetic.train(synthetic.config(), workdir, first=11)
    assert lines(workdir, "train")[-1]["step"] > 5
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "los')  # torn
    file = workdir / "checkpoints" / "10" / "variables" / "manifest.ocdbt"
    file.write_bytes(file.read_bytes()[:20])
    synthetic.train(synthetic.config(), workdir)
    assert "Resuming from step 5 instead" in capsys.readouterr().out
    assert metrics_of(workdir) == metrics_of(finished[0])
    synthetic.restored(workdir, synthetic.config(), 10)  # saved again


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
        synthetic.train(config, tmp_path, first=8)
    assert newest(tmp_path) == saved
    synthetic.train(config, tmp_path)
    assert metrics_of(tmp_path) == metrics_of(finished[0])


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
    same_but_for_rounding(tmp_path / "whole", finished[0])
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_files_that_lack_steps_before_the_checkpoint_are_not_gone_on_with(finished, tmp_path, name):
    """As after a power cut that the checkpoint survived and the end of the file did not."""
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "summary.json").unlink()
    content = (workdir / name).read_text().splitlines(keepends=True)
    (workdir / name).write_text("".join(content[:7]))
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
    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c", *words]
        subprocess.run(command, check=True, capture_output=True)

    git("init")
    for name in ("other", "bnjax"):
        assert summary._git_revision(tmp_path / "bnjax") is None
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
        git("add", name)
        git("commit", "-m", name)
    assert summary._git_revision(tmp_path / "bnjax")
    assert summary._git_revision(tmp_path / "nowhere") is None


def test_file_order_sees_the_images_in_their_order(tmp_path):
    seen = []

    def watching(step, item, seed):
        seen.append(item["label"])
        return item

    config = synthetic.config(steps=5)
    config.train.shuffle = False
    synthetic.train(config, tmp_path, each=watching)
    np.testing.assert_array_equal(np.concatenate(seen)[:50], np.tile(DATA.train.label, 2)[:50])


def test_slow_averages_spoil_the_test_loss_and_are_warned_of(finished, tmp_path, capsys):
    """The tutorial's trap: with 0.99, evaluation still sees mean 0 and variance 1."""
    config = synthetic.config()
    config.model.momentum = 0.99
    slow = synthetic.train(config, tmp_path)["final_test"]["loss"]
    assert "initial values" in capsys.readouterr().out
    assert slow > 1.5 * finished[1]["final_test"]["loss"]


def test_one_seed_stops_at_a_step_that_is_not_finite_and_the_other_goes_on(finished, tmp_path):
    """As if it were alone."""
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    bad = synthetic.bad_in(7, of=1)
    both = synthetic.train_seeds(synthetic.config(), folders, each=bad)
    assert (both[0]["final_test"]["step"], both[0]["skipped_steps"]) == (12, 0)
    same_but_for_rounding(folders[0], finished[0])
    assert isinstance(both[1], NonFiniteError)
    assert str(both[1]).startswith("step 7 gave ")
    assert "is in the losses. The checkpoint of step 5 is kept" in str(both[1])
    assert [line.get("skipped", 0) for line in lines(folders[1], "train")] == [0] * 6 + [1]
    assert newest(folders[1]) == 5


def test_bad_steps_may_be_skipped_and_those_in_a_row_are_counted_across_an_interruption(tmp_path):
    """Steps 3 and 5 are skipped and saved; a second one in a row is one too many."""
    config = synthetic.config()
    config.train.on_nonfinite, config.train.most_skipped = "skip", 1
    with pytest.raises(StopIteration):
        synthetic.train(config, tmp_path, each=synthetic.bad_in(3, 5), first=5)
    with pytest.raises(NonFiniteError, match="step 6 and 1 before it"):
        synthetic.train(config, tmp_path, each=synthetic.bad_in(6))
    assert synthetic.train(config, tmp_path)["skipped_steps"] == 2
    train = lines(tmp_path, "train")
    assert [line["step"] for line in train if "skipped" in line] == [3, 5]
    assert [line["loss"] is None for line in train[2:4]] == [True, False]
    leaves = jax.tree.leaves(synthetic.restored(tmp_path, config))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


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

    synthetic.train(synthetic.config(steps=16), tmp_path, each=counting)
    assert 0 < compiled[0] < compiled[1]  # the initial values, the step
    assert compiled[4] == compiled[1]
    assert compiled[6] > compiled[4]  # the evaluation after step 5
    assert compiled[15] == compiled[6]
    assert "s, not included in the training time" in capsys.readouterr().out
    assert read_lines(tmp_path / "timing.jsonl")[4]["seconds"] < 1.2


def test_each_seed_may_stop_at_a_loss(finished, tmp_path):
    losses = [line["loss"] for line in lines(finished[0], "train")]
    config = synthetic.config()
    config.train.stop_at_loss = config.train.target_loss = losses[6] + 1e-3
    first = next(step for step, loss in enumerate(losses, 1) if loss <= config.train.stop_at_loss)
    folders = {seed: tmp_path / str(seed) for seed in (0, 1)}
    found = synthetic.train_seeds(config, folders)
    assert found[0]["steps"] == first != found[1]["steps"]
    assert found[0]["ended"].startswith("training loss at or below")
    assert list(found[0]["steps_to_loss"].values()) == [first]
    mine = [line["loss"] for line in lines(folders[0], "train")]
    np.testing.assert_allclose(mine, losses[:first], rtol=1e-3)
    for seed, folder in folders.items():
        last = read_lines(folder / "metrics.jsonl")[-1]
        assert (last["step"], last["split"]) == (found[seed]["steps"], "test")
        assert newest(folder) == last["step"]
    # As after a crash between the last checkpoint and the summary: nothing is left to train.
    before = metrics_of(folders[0])
    (folders[0] / "summary.json").unlink()
    assert synthetic.train(config, folders[0])["steps"] == first
    assert metrics_of(folders[0]) == before
