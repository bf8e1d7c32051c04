"""Variants over seeds in one folder: nothing is repeated or mixed up, a run is what it is alone."""

import json
import re
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from bnjax import main
from bnjax.compare import claims, grid, text
from bnjax.compare.runs import finished_runs, time
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, parsing, rundir
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.loop import Stopped, Trainer, train_and_evaluate
from bnjax.train.run import StopRequest
from bnjax.train.rundir import read_lines
from bnjax.train_step import init_state

CONFIG = """
import synthetic

def get_config():
    config = synthetic.config(steps=6)
    config.name = ""
    config.data.name = "digits"
    config.data.train_images = 48
    config.eval.batch_size = 359
"""
FILES = {
    "bn": CONFIG + "    return config\n",
    "no_bn": CONFIG + "    config.model.norm = 'none'\n    return config\n",
}
STATEMENT = {
    "quantity": "test_accuracy",
    "at": "last",
    "of": "bn",
    "against": "no_bn",
    "direction": "greater",
    "margin": 0,
    "source": "me",
}
CLAIM = {
    "question": "Does it help?",
    "variants": {"bn": ("bn.py", {}), "no_bn": ("bn.py", {"model.norm": "none"})},
    "statements": [STATEMENT],
    "seeds": 2,
    "small": {"train.steps": 5, "model.filters": (2,)},
    "full": {"train.steps": 9},
}


@pytest.fixture
def files(tmp_path):
    for name, content in FILES.items():
        (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "claim.py").write_text(f"def get_claim():\n    return {CLAIM!r}\n")
    return tmp_path


def compare(folder, comparison, count, trainer=Trainer, way="one"):
    """Takes the runs of so many seeds on the synthetic data."""
    for variant in comparison["variants"].values():
        variant["dataset"] = "synthetic"
    datasets = dict.fromkeys(comparison["variants"], synthetic.dataset())
    comparison |= {"seeds": list(range(count)), "command": "bnjax compare"}
    return grid.run(comparison, datasets, folder, way, trainer)


def both(files, *words):
    return grid.compare_configs([str(files / "bn.py"), str(files / "no_bn.py")], [*words])


def counting(seen, trainer=Trainer):
    """A trainer that notes the name and the seeds of what is trained together."""

    def make(config, dataset):
        real = trainer(config, dataset)

        def train(folders, stop):
            seen.append((config.name, *folders))
            return real.train(folders, stop)

        return SimpleNamespace(train=train)

    return make


class Pretend:
    """Leaves the folders of finished runs behind, whose accuracy tells the seed."""

    def __init__(self, config, dataset):
        self.config, self.dataset = config, dataset

    def train(self, folders, stop):
        return {seed: self.leave(seed, folder) for seed, folder in folders.items()}

    def leave(self, seed, folder):
        self.config.seed = seed
        (folder / "checkpoints" / "6").mkdir(parents=True)
        data = {"name": "synthetic", "label": "synthetic", "image_shape": [8, 8, 1]}
        config = {"config": self.config.to_dict(), "data": data | {"classes": CLASSES}}
        (folder / "config.json").write_text(json.dumps(config))
        metrics = [
            {"step": 6, "split": split, "loss": 0.5, "accuracy": seed / 10}
            for split in ("train", "test")
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
        (folder / "timing.jsonl").write_text('{"step": 6, "seconds": 1.5}\n')
        summary = {"steps": 6, "versions": {}, "batch_size": 10}
        (folder / "summary.json").write_text(json.dumps(summary))
        return summary


CLASSES = ["top", "middle", "bottom"]


def call(*words):
    return main.main(["compare", *map(str, words)])


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    """What one run of bn with seed 1 makes."""
    folder = tmp_path_factory.mktemp("solo")
    (folder / "bn.py").write_text(FILES["bn"])
    config = parsing.load(str(folder / "bn.py"), ["--config.seed=1"])
    train_and_evaluate(config, folder / "run", synthetic.dataset())
    return folder / "run"


def losses_of(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [line["loss"] for line in lines if line["split"] == "train"]


def test_every_variant_has_a_run_for_every_seed_that_equals_the_solo_run(files, solo, capsys):
    trained = []
    assert compare(files / "runs", both(files), 2, counting(trained)) == []
    assert trained == [("bn", 0), ("bn", 1), ("no_bn", 0), ("no_bn", 1)]
    assert "[3/4] no_bn, seed 0, about" in capsys.readouterr().out
    mine, its = (folder / "metrics.jsonl" for folder in (files / "runs" / "bn" / "1", solo))
    assert mine.read_bytes() == its.read_bytes()
    found = claims.read(files / "runs")
    assert found["seeds"] == [0, 1]
    assert {name: variant["differs"] for name, variant in found["variants"].items()} == {
        "bn": {"model.norm": "batch"},
        "no_bn": {"model.norm": "none"},
    }
    assert all(variant["dataset"] == "synthetic" for variant in found["variants"].values())
    said = text.of_comparison(found, finished_runs(files / "runs", found))
    assert "no_bn on synthetic: 2 of 2 runs finished" in said
    assert "test accuracy at the end, no_bn - bn: " in said


def test_the_best_and_the_last_checkpoint_are_kept_once_the_run_can_be_locked(files):
    """Without learning all evaluations are alike, so that the first is the best."""
    words = ["--config.optimizer.learning_rate=1e-30", "--config.train.steps=8"]
    comparison = both(files, *words, "--config.eval.every_steps=2")
    compare(files / "runs", comparison, 1)
    checkpoints = files / "runs" / "no_bn" / "0" / "checkpoints"
    assert sorted(int(path.name) for path in checkpoints.iterdir() if path.is_dir()) == [2, 8]
    with Checkpoints(checkpoints, read_only=True) as found:
        assert (found.step("best"), found.step("last")) == (2, 8)
        for step in found.steps():
            found.verify(step)
    shutil.copytree(checkpoints / "8", checkpoints / "4")
    with rundir.locked(checkpoints.parent), pytest.raises(UserError, match="another process"):
        compare(files / "runs", comparison, 1)
    assert (checkpoints / "4").exists()
    compare(files / "runs", comparison, 1)
    assert not (checkpoints / "4").exists()


@pytest.mark.parametrize("way", ["vmap", "devices"])
def test_seeds_at_once_are_their_solo_runs_but_for_rounding(files, solo, way):
    trained, alone = [], grid.compare_configs([str(files / "bn.py")], [])
    compare(files / "runs", alone, 3, counting(trained), way)
    together = [("bn", 0, 1, 2)] if way == "vmap" else [("bn", 0), ("bn", 1), ("bn", 2)]
    assert sorted(trained) == together
    mine, its = (
        read_lines(folder / "metrics.jsonl") for folder in (files / "runs" / "bn" / "1", solo)
    )
    assert [{**line, "loss": 0} for line in mine] == [{**line, "loss": 0} for line in its]
    np.testing.assert_allclose(
        [line["loss"] for line in mine], [line["loss"] for line in its], rtol=1e-4
    )
    others = [losses_of(files / "runs" / "bn" / str(seed))[0] for seed in range(3)]
    assert len({*others}) == 3


def test_seeds_in_one_program_go_on_from_where_each_stands(tmp_path):
    """As after a kill: the newest checkpoint of one run is older than those of the others."""
    config = synthetic.config(steps=6)
    folders = {seed: tmp_path / str(seed) for seed in range(3)}
    with StopRequest() as stop:
        Trainer(config, synthetic.dataset()).train(folders, stop)
        wanted = {seed: (folder / "metrics.jsonl").read_bytes() for seed, folder in folders.items()}
        for seed, folder in folders.items():
            (folder / "summary.json").unlink()
            shutil.rmtree(folder / "checkpoints" / "6")
            if seed == 1:
                shutil.rmtree(folder / "checkpoints")
        found = Trainer(config, synthetic.dataset()).train(folders, stop)
    assert [summary["steps"] for summary in found.values()] == [6, 6, 6]
    for seed, folder in folders.items():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
        before = [json.loads(line) for line in wanted[seed].splitlines()]
        assert [(line["step"], line["split"]) for line in lines] == [
            (line["step"], line["split"]) for line in before
        ]
        np.testing.assert_allclose(
            [line["loss"] for line in lines], [line["loss"] for line in before], rtol=1e-4
        )


def at_once(trainer, count, folder, end=lambda _: None):
    """Trains so many seeds side by side; returns what came, and the seeds as they began."""
    begun = []
    folders = {seed: folder / str(seed) for seed in range(count)}
    with StopRequest() as stop:
        found = grid.train(trainer, folders, "devices", stop, begun.extend, end)
    return found, begun


def test_each_device_has_one_trainer_for_all_its_seeds(tmp_path):
    made = []

    def trainer():
        (device,) = jnp.zeros(()).devices()
        made.append(device)
        return SimpleNamespace(train=lambda folders, _: {seed: {} for seed in folders})

    found, begun = at_once(trainer, 20, tmp_path)
    assert sorted(found) == sorted(begun) == list(range(20))
    assert len(made) == len({*made}) == jax.local_device_count() == 8


def test_a_run_that_breaks_down_on_one_device_is_said_while_the_others_go_on(tmp_path):
    said, known = [], threading.Event()

    def train(folders, _):
        (seed,) = folders
        if seed == 0:
            return {0: NonFiniteError("step 3")}
        assert known.wait(9)
        return {seed: {}}

    def end(results):
        said.append(results)
        if 0 in results:
            known.set()

    found, begun = at_once(lambda: SimpleNamespace(train=train), 3, tmp_path, end)
    assert len(said) == len(found) == len(begun) == 3
    assert [str(result) for result in said[0].values()] == ["step 3"]


class SlowlyCounted(dict):
    """Takes a while to say how many it has, in which other threads come by."""

    busy = threading.Lock()

    def __len__(self):
        assert self.busy.acquire(blocking=False), "two threads count at once"
        threading.Event().wait(0.003)
        self.busy.release()
        return super().__len__()


def test_several_threads_may_tell_the_progress(capsys):
    ready = threading.Barrier(8)

    def train(first):
        runs = SlowlyCounted({first: {}, first + 1: UserError("no space")})
        ready.wait(9)
        progress.begin("bn", runs)
        progress.end("bn", runs)

    with grid.GridProgress(16) as progress, ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(train, first) for first in range(0, 16, 2)]:
            done.result()
    said = capsys.readouterr().out
    begun = re.findall(r"\[(\d+)/16\] bn, seeds", said)
    assert [*map(int, begun)] == [2, 4, 6, 8, 10, 12, 14, 16]
    failed = re.findall(r"bn, seed (\d+) failed: no space", said)
    assert sorted(map(int, failed)) == [1, 3, 5, 7, 9, 11, 13, 15]


def test_what_goes_wrong_on_one_device_is_said_and_the_others_stop(tmp_path):
    said, begun = [], []
    running = threading.Barrier(8)

    def train(folders, stop):
        (seed,) = folders
        begun.append(seed)
        running.wait(9)
        if seed == 0:
            raise UserError("no space")
        for _ in range(900):
            if stop.signal:
                raise Stopped(3, stop.signal)
            threading.Event().wait(0.01)
        return {seed: {}}

    with pytest.raises(UserError, match="no space"):
        at_once(lambda: SimpleNamespace(train=train), 40, tmp_path, said.append)
    assert sorted(begun) == list(range(8))
    assert [[str(result) for result in results.values()] for results in said] == [["no space"]]


@pytest.mark.parametrize("way", ["one", "devices"])
def test_a_signal_between_two_runs_is_remembered(tmp_path, way):
    def trainer():
        return Trainer(synthetic.config(), synthetic.dataset())

    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match=r"stopped by SIGTERM$"):
            grid.train(trainer, {0: tmp_path / "0"}, way, stop, lambda _: None, lambda _: None)


def test_each_of_several_seeds_ends_where_its_own_loss_is_low_enough(tmp_path):
    config = synthetic.config(steps=6)
    folders = {seed: tmp_path / str(seed) for seed in range(3)}
    with StopRequest() as stop:
        Trainer(config, synthetic.dataset()).train(folders, stop)
        losses = {seed: losses_of(folder) for seed, folder in folders.items()}
        lowest = sorted(min(some) for some in losses.values())
        config.train.stop_at_loss = target = lowest[1] + 1e-3  # two of three get there
        ended = {seed: tmp_path / f"ended{seed}" for seed in folders}
        found = Trainer(config, synthetic.dataset()).train(ended, stop)
    for seed, some in losses.items():
        first = next((step for step, loss in enumerate(some, start=1) if loss <= target), 6)
        last = read_lines(ended[seed] / "metrics.jsonl")[-1]
        assert (found[seed]["steps"], last["step"], last["split"]) == (first, first, "test")
        assert (ended[seed] / "checkpoints" / str(first)).is_dir()


def test_finished_runs_are_not_repeated_and_seeds_may_be_added(files, capsys):
    calls, folder = [], files / "runs"
    trainer = counting(calls, Pretend)
    compare(folder, both(files), 1, trainer)
    before = {path: path.read_bytes() for path in folder.rglob("metrics.jsonl")}
    calls.clear()
    compare(folder, both(files), 1, trainer)
    assert calls == []
    assert "[1/2] bn, seed 0: finished before" in capsys.readouterr().out
    compare(folder, both(files), 2, trainer)
    assert calls == [("bn", 1), ("no_bn", 1)]
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(UserError, match=r"seeds: \[1\] there, but not now"):
        compare(folder, both(files), 1, trainer)


def test_an_interrupted_comparison_goes_on(files):
    trained = []

    def interrupted(config, dataset):
        def train(folders, stop):
            if config.name == "no_bn":
                stop.signal = signal.SIGINT
            return Trainer(config, dataset).train(folders, stop)

        return SimpleNamespace(train=train)

    with pytest.raises(Stopped, match="SIGINT"):
        compare(files / "runs", both(files), 1, interrupted)
    compare(files / "runs", both(files), 1, counting(trained))
    assert trained == [("no_bn", 0)]
    lines = read_lines(files / "runs" / "no_bn" / "0" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_another_comparison_in_the_folder_is_refused_with_the_difference(files):
    calls = []
    compare(files / "runs", both(files), 1, Pretend)
    changed = r"variants\.bn\.config\.model\.momentum: 0\.75 there, 0\.9 now"
    other = both(files, "--config.model.momentum=0.9")
    with pytest.raises(UserError, match=changed):
        compare(files / "runs", other, 1, counting(calls, Pretend))
    (files / "other").mkdir()
    (files / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex but no comparison"):
        compare(files / "other", both(files), 1, counting(calls, Pretend))
    assert calls == []


def test_a_claim_is_tried_small_or_full_and_is_fixed_before_the_runs(files):
    def claim(full=False):
        return grid.compare_claim(str(files / "claim.py"), [], full=full)

    compare(files / "runs", claim(), 2, Pretend)
    found = claims.read(files / "runs")
    assert (found["size"], found["seeds"], found["seeds_needed"]) == ("small", [0, 1], 2)
    assert {variant["config"]["train"]["steps"] for variant in found["variants"].values()} == {5}
    (verdict,) = claims.verdicts(found, finished_runs(files / "runs", found))
    assert verdict.effect.n == 2
    assert str(verdict.statement) == "test accuracy (last): bn - no_bn is greater than 0"
    assert claim(full=True)["variants"]["bn"]["config"]["train"]["steps"] == 9
    other = CLAIM | {"statements": [STATEMENT | {"margin": 0.5}]}
    (files / "claim.py").write_text(f"def get_claim():\n    return {other!r}\n")
    with pytest.raises(UserError, match=r"statements\.1\.margin: 0 there, 0\.5 now"):
        compare(files / "runs", claim(), 2, Pretend)


def test_equal_seeds_have_equal_initial_values_and_order(files):
    """Also where the variants differ: what they share is drawn alike."""
    kernels = []
    for variant in both(files)["variants"].values():
        experiment = build.experiment(parsing.from_dict(variant["config"]), synthetic.dataset())
        init_key, _ = jax.random.split(jax.random.key(3))
        image = synthetic.dataset().train.image[:1]
        state, _ = init_state(experiment.model, experiment.tx, init_key, image)
        kernels.append(state.params["conv0"]["kernel"])
    assert (kernels[0] == kernels[1]).all()


def test_a_run_that_breaks_down_does_not_end_the_others(files, capsys):
    """As a command: what every kind of run says, and the exit code."""
    broken = FILES["bn"].replace("return", "config.optimizer.learning_rate = 1e38\n    return")
    (files / "bn.py").write_text(broken)
    words = ["--configs", f"{files / 'bn.py'},{files / 'no_bn.py'}", "--workdir", files / "runs"]
    assert call(*words, "--seeds", 1) == 1
    out, err = capsys.readouterr()
    assert "bn, seed 0 failed: step" in out
    assert "error: bn, seed 0: step" in err
    assert "no_bn on digits, the first 48 training images: 1 of 1 runs finished" in out
    assert f"report: {files / 'runs' / 'report.html'}" in out
    assert claims.read(files / "runs")["command"].startswith("bnjax compare --configs ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.seed=3"], "Say how many with --seeds"),
        (
            ["--config.train.batch_size=4000"],
            "bn cannot be trained: config.train.batch_size = 4000",
        ),
        (["--config.model.momentun=1"], "Did you mean"),
        (["surplus"], "'surplus' is not understood"),
    ],
)
def test_mistakes_show_before_anything_is_trained(files, words, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        grid.load_datasets(both(files, *words))


def test_variants_of_the_same_data_share_them(files):
    comparison = both(files)
    bn, no_bn = grid.load_datasets(comparison).values()
    assert bn is no_bn
    assert len(bn.train.label) == 48
    assert {variant["dataset"] for variant in comparison["variants"].values()} == {
        "digits, the first 48 training images"
    }


def test_two_configs_of_one_name_are_refused(files):
    with pytest.raises(UserError, match="same name: bn, bn"):
        grid.compare_configs([str(files / "bn.py")] * 2, [])


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), Stopped(3, signal.SIGINT)])
def test_ctrl_c_is_no_error(files, monkeypatch, capsys, stopped):
    def interrupted(*_):
        raise stopped

    monkeypatch.setattr(grid, "run", interrupted)
    assert call("--configs", files / "bn.py", "--workdir", files / "runs") == 130
    said = capsys.readouterr().out
    assert "everything is saved. To go on:\n    bnjax compare --configs" in said


def test_damaged_results_are_named(files):
    compare(files / "runs", both(files), 1, Pretend)
    found = claims.read(files / "runs")
    (run, _) = finished_runs(files / "runs", found)
    for name, content in (
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("metrics.jsonl", ""),
        ("config.json", "{}"),
        ("timing.jsonl", '{"step": 1}\n'),
    ):
        file = run.folder / name
        before = file.read_bytes()
        file.write_text(content)
        with pytest.raises(UserError, match=f"{name}|no training step"):
            time(finished_runs(files / "runs", found)[0], "seconds_to_accuracy", 0.0)
        file.write_bytes(before)
