"""Variants over seeds in one folder: nothing is repeated or mixed up, a run is what it is alone."""

import functools
import signal
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from made_runs import statement, write_run

from bnjax.commands.compare import as_text
from bnjax.compare import claims, grid, report
from bnjax.compare.runs import finished_runs, read_comparison
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, parsing, rundir
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.interrupt import Stopped
from bnjax.train.jsonl import read_lines
from bnjax.train.loop import Trainer
from bnjax.train_step import init_state

BN = """
import synthetic

def get_config():
    config = synthetic.config(steps=6)
    config.name = ""
    config.data.name = "digits"
    config.data.train_images = 48
    config.eval.batch_size = 359
    config.eval.every_steps = 3
    return config
"""
VARIANTS = {"bn": ("bn.py", {"model.momentum": 0.75}), "no_bn": ("bn.py", {"model.norm": "none"})}
ALONE = {"bn": VARIANTS["bn"]}
STATEMENT = statement(of="bn", against="no_bn", margin=0)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "bn.py").write_text(BN)
    return tmp_path


def compare(folder, comparison, count, trainer=synthetic.trainer, way="one"):
    """Takes the runs of so many seeds on the synthetic data."""
    for variant in comparison["variants"].values():
        variant["dataset"] = "synthetic"
    datasets = dict.fromkeys(comparison["variants"], synthetic.dataset())
    comparison |= {"seeds": list(range(count)), "command": "bnjax compare"}
    return grid.run(comparison, datasets, folder, way, trainer)


def planned(files, *words, variants=VARIANTS, statements=()):
    named = {name: (str(files / file), own) for name, (file, own) in variants.items()}
    return grid.plan(claims.Claim("", named, [*statements], 0, {}), [*words])


def hooked(hook, trainer=synthetic.trainer):
    """A trainer that calls hook(name, seeds, stop), and trains unless that returns results."""

    def make(config, dataset):
        real = trainer(config, dataset)

        def train(folders, stop):
            return hook(config.name, [*folders], stop) or real.train(folders, stop)

        return SimpleNamespace(train=train)

    return make


def counting(seen, trainer=synthetic.trainer):
    return hooked(lambda name, seeds, _: seen.append((name, *seeds)), trainer)


def pretend(config, dataset):
    """A trainer that leaves the folders of finished runs behind."""

    def train(folders, stop):
        for seed, folder in folders.items():
            write_run(folder, seed, name=config.name, config=config, inside=False)
            (folder / "checkpoints" / "5").mkdir(parents=True)
        return {seed: {} for seed in folders}

    return SimpleNamespace(train=train)


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    """What one run of bn with seed 1 makes."""
    folder = tmp_path_factory.mktemp("solo")
    (folder / "bn.py").write_text(BN)
    config = parsing.load(str(folder / "bn.py"), ["--config.seed=1"])
    synthetic.train(config, folder / "run")
    return folder / "run"


def test_every_variant_has_a_run_for_every_seed_that_equals_the_solo_run(files, solo, capsys):
    """And keeps the best and the last checkpoint; an interrupted comparison goes on."""
    trained, folder = [], files / "runs"

    def interrupted(name, seeds, stop):
        stop.signal = signal.SIGINT if name == "no_bn" else None

    with pytest.raises(Stopped, match="SIGINT"):
        compare(folder, planned(files), 2, hooked(interrupted))
    with rundir.locked(folder / "bn" / "0"), pytest.raises(UserError, match="another process"):
        compare(folder, planned(files), 2, counting(trained))
    assert trained == [("no_bn", 0), ("no_bn", 1)]
    assert compare(folder, planned(files), 2, counting(trained)) == []
    assert len(trained) == 2
    said = capsys.readouterr().out
    assert "2 of 4 runs are already finished\n[1/2] no_bn, seed 0\n" in said
    assert "[2/2] no_bn, seed 1, about" in said
    mine, its = (run / "metrics.jsonl" for run in (folder / "bn" / "1", solo))
    assert mine.read_bytes() == its.read_bytes()
    for run in (folder / "bn" / "0", folder / "no_bn" / "1"):
        with Checkpoints(run / "checkpoints", read_only=True) as found:
            assert {*found.steps()} == {found.step("best"), found.step("last")}
            for step in found.steps():
                found.verify(step)
    found = read_comparison(folder)
    assert {variant["dataset"] for variant in found["variants"].values()} == {"synthetic"}
    text = as_text(found, finished_runs(folder, found))
    assert "no_bn on synthetic: 2 of 2 runs finished" in text
    assert "test accuracy at the end, no_bn - bn: " in text
    assert "give --seeds 5" in text


@pytest.mark.parametrize("way", ["vmap", pytest.param("devices", marks=pytest.mark.slow)])
def test_seeds_at_once_are_their_solo_runs_but_for_rounding(files, solo, way):
    trained, alone = [], planned(files, variants=ALONE)
    trainer = Trainer if way == "devices" else synthetic.trainer  # each device compiles its own
    compare(files / "runs", alone, 2, counting(trained, trainer), way)
    assert sorted(trained) == ([("bn", 0, 1)] if way == "vmap" else [("bn", 0), ("bn", 1)])
    other, mine, its = (
        read_lines(folder / "metrics.jsonl")
        for folder in (files / "runs" / "bn" / "0", files / "runs" / "bn" / "1", solo)
    )
    assert [{**line, "loss": 0} for line in mine] == [{**line, "loss": 0} for line in its]
    losses = [[line["loss"] for line in lines] for lines in (mine, its)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert other[0]["loss"] != mine[0]["loss"]


def test_each_device_has_one_trainer_and_a_run_that_breaks_down_does_not_end_the_others(
    files, capsys
):
    made = []

    def trainer(config, dataset):
        (device,) = jnp.zeros(()).devices()
        made.append(device)
        return SimpleNamespace(train=train)

    def train(folders, _):
        return {seed: NonFiniteError("step 3") if seed == 2 else {} for seed in folders}

    alone = planned(files, variants=ALONE)
    assert compare(files / "runs", alone, 20, trainer, "devices") == ["bn, seed 2: step 3"]
    assert len(made) == len({*made}) == jax.local_device_count() == 8
    said = capsys.readouterr().out
    assert "bn, seed 2 failed: step 3" in said
    for number in range(1, 21):
        assert f"[{number}/20] bn, seed " in said


def test_what_goes_wrong_on_one_device_is_said_and_the_others_stop(files):
    begun, running = [], threading.Barrier(8)

    def fail(_, seeds, stop):
        begun.extend(seeds)
        running.wait(9)
        if seeds == [0]:
            raise UserError("no space")
        for _ in range(900):
            if stop.signal:
                raise Stopped(3, stop.signal)
            threading.Event().wait(0.01)

    alone = planned(files, variants=ALONE)
    with pytest.raises(UserError, match="no space"):
        compare(files / "runs", alone, 40, hooked(fail, pretend), "devices")
    assert sorted(begun) == list(range(8))


def test_finished_runs_are_not_repeated_and_only_seeds_may_be_added(files):
    calls, folder = [], files / "runs"
    trainer, plan = counting(calls, pretend), functools.partial(planned, statements=[STATEMENT])
    for count, done in ((1, 2), (1, 2), (2, 4), (2, 4)):
        compare(folder, plan(files), count, trainer)
        assert calls == [("bn", 0), ("no_bn", 0), ("bn", 1), ("no_bn", 1)][:done]
    found = read_comparison(folder)
    (verdict,) = claims.verdicts(found, finished_runs(folder, found))
    assert verdict.effect.n == 2
    assert str(verdict.statement) == "test accuracy (last): bn - no_bn is greater than 0"
    wide, momentum = STATEMENT | {"margin": 0.5}, "--config.model.momentum=0.9"
    for changed, count, said in (
        (plan(files), 1, r"seeds: \[0, 1\] there, \[0\] now"),
        (plan(files, momentum), 2, r"variants\.bn\.config\.model\.momentum: 0\.75 there, 0\.9 now"),
        (planned(files, statements=[wide]), 2, r"statements\.1\.margin: 0 there, 0\.5 now"),
    ):
        with pytest.raises(UserError, match=said):
            compare(folder, changed, count, trainer)
    (files / "other").mkdir()
    (files / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex but no comparison"):
        compare(files / "other", plan(files), 1, trainer)
    (folder / "comparison.json").write_text("{")
    with pytest.raises(UserError, match=r"comparison\.json is damaged"):
        compare(folder, plan(files), 2, trainer)


def test_equal_seeds_have_equal_initial_values(files):
    """Also where the variants differ: what they share is drawn alike."""
    kernels = []
    for variant in planned(files)["variants"].values():
        experiment = build.experiment(parsing.from_dict(variant["config"]), synthetic.dataset())
        init = jax.jit(functools.partial(init_state, experiment.model, experiment.tx))
        state, _ = init(jax.random.key(3), synthetic.dataset().train.image[:1])
        kernels.append(state.params["conv0"]["kernel"])
    np.testing.assert_array_equal(*kernels)


def test_the_command_says_which_run_broke_down(files, bnjax, monkeypatch):
    def fail(name, *_):
        return {0: NonFiniteError("step 3")} if name == "bn" else None

    trainer = hooked(fail, pretend)
    monkeypatch.setattr(grid, "run", functools.partial(grid.run, trainer=trainer))
    monkeypatch.setattr(report, "write", lambda folders, out: (out / "report.html", []))
    (files / "no_bn.py").write_text(BN)
    words = ["--configs", f"{files / 'bn.py'},{files / 'no_bn.py'}", "--workdir", files / "runs"]
    code, out, err = bnjax("compare", *words, "--seeds", 1)
    assert code == 1
    assert "bn, seed 0 failed: step 3" in out
    assert "error: bn, seed 0: step 3" in err
    assert "no_bn on digits, the first 48 training images: 1 of 1 runs finished" in out
    assert f"report: {files / 'runs' / 'report.html'}" in out
    assert read_comparison(files / "runs")["command"].startswith("bnjax compare --configs ")

    def unwritable(*_):
        raise OSError("read-only")

    monkeypatch.setattr(report, "write", unwritable)
    code, out, err = bnjax("compare", *words, "--seeds", 1)
    assert "no report: read-only" in out
    assert (code, "error: bn, seed 0: step 3" in err) == (1, True)


def test_variants_share_data_and_mistakes_show_before_anything_is_trained(files):
    comparison = planned(files, "--config.data.fallback=digits")
    for variant in comparison["variants"].values():  # other data would be no evidence
        assert variant["config"]["data"]["fallback"] == ""
    bn, no_bn = grid.load_datasets(comparison).values()
    assert bn is no_bn
    assert len(bn.train.label) == 48
    labels = {variant["dataset"] for variant in comparison["variants"].values()}
    assert labels == {"digits, the first 48 training images"}
    for wrong, said in (
        (lambda: planned(files, "--config.seed=3"), "Use --seeds instead"),
        (
            lambda: grid.load_datasets(planned(files, "--config.train.batch_size=4000")),
            "bn cannot be trained: config.train.batch_size = 4000",
        ),
        (lambda: claims.of_configs([str(files / "bn.py")] * 2), "same name: bn, bn"),
        (lambda: planned(files, variants={"../bn": ALONE["bn"]}), r"cannot be called '\.\./bn'"),
    ):
        with pytest.raises(UserError, match=said):
            wrong()


@pytest.mark.parametrize("stopped", [KeyboardInterrupt(), Stopped(3, signal.SIGINT)])
def test_ctrl_c_is_no_error(files, monkeypatch, bnjax, stopped):
    def interrupted(*_):
        raise stopped

    monkeypatch.setattr(grid, "run", interrupted)
    code, said, _ = bnjax("compare", "--configs", files / "bn.py", "--workdir", files / "runs")
    assert code == 130
    assert "everything is saved. To resume:\n    bnjax compare --configs" in said
