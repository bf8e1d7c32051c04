"""Variants over seeds in one folder: nothing is repeated, nothing is mixed up, and a run is what it is alone."""

import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import synthetic

from bnjax import main
from bnjax.compare import claims, grid, report, results, seeds
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, loop, parsing, run, rundir
from bnjax.train.interrupt import StopRequest
from bnjax.train.loop import Stopped, train_and_evaluate
from bnjax.train.records import read_lines
from bnjax.train_step import init_state

CONFIG = "import synthetic\n\ndef get_config():\n    config = synthetic.config(steps=6)\n    config.name = ''\n"
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
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "dataset", lambda config: synthetic.dataset())
    monkeypatch.setattr(
        report, "write", lambda folder: folder / "report.html"
    )  # takes seconds, and has tests of its own
    for name, content in FILES.items():
        (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "claim.py").write_text(f"def get_claim():\n    return {CLAIM!r}\n")
    return tmp_path


def pretend(config, dataset, workdir):
    """Leaves the folder of a finished run behind, whose accuracy tells the seed."""
    workdir.mkdir()
    rundir.claim(workdir, config, rundir.DataFacts.of(dataset))
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    metrics = [
        {"step": 6, "split": split, "loss": 0.5, "accuracy": config.seed / 10}
        for split in ("train", "test")
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (workdir / "timing.jsonl").write_text('{"step": 6, "seconds": 1.5}\n')
    (workdir / "summary.json").write_text('{"steps": 6}')


def instead(monkeypatch, train):
    """Lets `train(config, dataset, workdir)` stand for training; returns the (name, seed) of each run that comes."""
    seen = []

    def each(config, dataset, folders, way, stop, begin):
        found = {}
        for config.seed, folder in folders.items():
            begin([config.seed])
            seen.append((config.name, config.seed))
            found[config.seed] = train(config, dataset, folder)
        return found

    monkeypatch.setattr(seeds, "train", each)
    return seen


@pytest.fixture
def calls(monkeypatch):
    return instead(monkeypatch, pretend)


@pytest.fixture
def trained(monkeypatch):
    """The name and the seeds of what is trained together from now on, for real."""
    seen, train = [], loop.Trainer.train

    def counted(self, folders, stop):
        seen.append((self._config.name, *folders))
        return train(self, folders, stop)

    monkeypatch.setattr(loop.Trainer, "train", counted)
    return seen


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["bnjax", "compare", *map(str, words)])
    return main.main()


def both(files):
    return ["--configs", f"{files / 'bn.py'},{files / 'no_bn.py'}", "--workdir", files / "runs"]


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    """What bnjax.main makes of bn with seed 1."""
    config = synthetic.config(steps=6)
    config.name, config.seed = "bn", 1
    folder = tmp_path_factory.mktemp("solo") / "run"
    train_and_evaluate(config, folder, synthetic.dataset())
    return folder


def test_every_variant_has_a_run_for_every_seed_that_equals_the_solo_run(
    files, solo, trained, monkeypatch, capsys
):
    assert call(monkeypatch, *both(files), "--seeds", 2) == 0
    assert trained == [("bn", 0), ("bn", 1), ("no_bn", 0), ("no_bn", 1)]
    said = capsys.readouterr().out
    assert "[3/4] no_bn, seed 0, about" in said
    assert "test accuracy at the end, no_bn - bn: " in said
    assert (files / "runs" / "bn" / "1" / "metrics.jsonl").read_bytes() == (
        solo / "metrics.jsonl"
    ).read_bytes()
    found = claims.read(files / "runs")
    assert found["seeds"] == [0, 1]
    assert found["command"].startswith("bnjax compare --configs ")
    assert {name: variant["differs"] for name, variant in found["variants"].items()} == {
        "bn": {"model.norm": "batch"},
        "no_bn": {"model.norm": "none"},
    }
    assert all(variant["dataset"] == "synthetic" for variant in found["variants"].values())
    for folder in (files / "runs").glob("*/*/checkpoints"):
        assert [path.name for path in folder.iterdir()] == ["6"]  # the last one only


@pytest.mark.parametrize("way", ["vmap", "devices"])
def test_seeds_at_once_are_their_solo_runs_but_for_rounding(files, solo, trained, monkeypatch, way):
    words = [
        "--configs",
        files / "bn.py",
        "--workdir",
        files / "runs",
        "--seeds",
        3,
        "--at-once",
        way,
    ]
    assert call(monkeypatch, *words) == 0
    assert sorted(trained) == (
        [("bn", 0, 1, 2)] if way == "vmap" else [("bn", 0), ("bn", 1), ("bn", 2)]
    )
    mine, its = (
        read_lines(folder / "metrics.jsonl") for folder in (files / "runs" / "bn" / "1", solo)
    )
    assert [{**line, "loss": 0} for line in mine] == [{**line, "loss": 0} for line in its]
    np.testing.assert_allclose(
        [line["loss"] for line in mine], [line["loss"] for line in its], rtol=1e-4
    )
    others = [
        read_lines(files / "runs" / "bn" / str(seed) / "metrics.jsonl")[0]["loss"]
        for seed in range(3)
    ]
    assert len({*others}) == 3


def test_seeds_in_one_program_go_on_from_where_each_stands(files, trained, monkeypatch):
    """As after a kill: the newest checkpoint of one run is older than those of the others."""
    config = synthetic.config(steps=6)
    folders = {seed: files / str(seed) for seed in range(3)}
    with StopRequest() as stop:
        loop.Trainer(config, synthetic.dataset()).train(folders, stop)
        wanted = {seed: (folder / "metrics.jsonl").read_bytes() for seed, folder in folders.items()}
        for seed, folder in folders.items():
            (folder / "summary.json").unlink()
            shutil.rmtree(folder / "checkpoints" / "6")
            if seed == 1:
                shutil.rmtree(folder / "checkpoints")
        found = loop.Trainer(config, synthetic.dataset()).train(folders, stop)
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


def test_what_goes_wrong_on_one_device_is_said_and_nothing_new_is_begun():
    begun = []

    def one(seed):
        begun.append(seed)
        if seed == 0:
            raise Stopped(3, signal.SIGTERM)
        if seed == 1:
            raise UserError("no space")
        time.sleep(0.3)
        return {seed: {}}

    with pytest.raises(UserError, match="no space"):
        seeds._side_by_side(one, list(range(40)))
    assert len(begun) < 20  # eight devices


def test_a_signal_between_two_runs_is_remembered(files):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match=r"stopped by SIGTERM$"):
            seeds.train(
                synthetic.config(),
                synthetic.dataset(),
                {0: files / "0"},
                "one",
                stop,
                lambda _: None,
            )


def test_each_of_several_seeds_ends_where_its_own_loss_is_low_enough(files, solo, trained):
    config = synthetic.config(steps=6)
    folders = {seed: files / str(seed) for seed in range(3)}
    with StopRequest() as stop:
        loop.Trainer(config, synthetic.dataset()).train(folders, stop)
        losses = {
            s: [
                line["loss"] for line in read_lines(f / "metrics.jsonl") if line["split"] == "train"
            ]
            for s, f in folders.items()
        }
        config.train.stop_at_loss = target = (
            sorted(min(some) for some in losses.values())[1] + 1e-3
        )  # two of three get there
        ended = {seed: files / f"ended{seed}" for seed in folders}
        found = loop.Trainer(config, synthetic.dataset()).train(ended, stop)
    for seed, some in losses.items():
        first = next((step for step, loss in enumerate(some, start=1) if loss <= target), 6)
        lines = read_lines(ended[seed] / "metrics.jsonl")
        assert (found[seed]["steps"], lines[-1]["step"], lines[-1]["split"]) == (
            first,
            first,
            "test",
        )
        assert [
            path.name for path in (ended[seed] / "checkpoints").iterdir() if path.name == str(first)
        ]


def test_finished_runs_are_not_repeated_and_seeds_may_be_added(files, calls, monkeypatch, capsys):
    assert call(monkeypatch, *both(files), "--seeds", 1) == 0
    before = {path: path.read_bytes() for path in (files / "runs").rglob("metrics.jsonl")}
    calls.clear()
    assert call(monkeypatch, *both(files), "--seeds", 1) == 0
    assert calls == []
    assert "[1/2] bn, seed 0: finished before" in capsys.readouterr().out
    assert call(monkeypatch, *both(files), "--seeds", 2) == 0
    assert calls == [("bn", 1), ("no_bn", 1)]
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(UserError, match=r"seeds: \[1\] there, but not now"):
        call(monkeypatch, *both(files), "--seeds", 1)


def test_an_interrupted_run_goes_on(files, trained, monkeypatch, capsys):
    stream = run.train_rows

    def interrupting(*args, **kwargs):
        for step, batch in enumerate(stream(*args, **kwargs), start=1):
            if trained[-1] == ("no_bn", 0) and step == 3:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(run, "train_rows", interrupting)
    assert call(monkeypatch, *both(files), "--seeds", 1) == 130
    said = capsys.readouterr().out
    assert (
        "stopped by SIGINT after step 3; everything is saved. To go on:\n    bnjax compare --configs"
        in said
    )
    monkeypatch.setattr(run, "train_rows", stream)
    trained.clear()
    assert call(monkeypatch, *both(files), "--seeds", 1) == 0
    assert trained == [("no_bn", 0)]
    metrics = [
        json.loads(line) for line in (files / "runs/no_bn/0/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in metrics if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_another_comparison_in_the_folder_is_refused_with_the_difference(files, calls, monkeypatch):
    call(monkeypatch, *both(files), "--seeds", 1)
    calls.clear()
    with pytest.raises(
        UserError, match=r"variants\.bn\.config\.model\.momentum: 0\.75 there, 0\.9 now"
    ):
        call(monkeypatch, *both(files), "--seeds", 1, "--config.model.momentum=0.9")
    (files / "other").mkdir()
    (files / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex but no comparison"):
        call(monkeypatch, *both(files)[:-1], files / "other")
    assert calls == []


def test_a_claim_is_tried_small_or_full_and_is_fixed_before_the_runs(
    files, calls, monkeypatch, capsys
):
    words = ["--claim", files / "claim.py", "--workdir", files / "runs"]
    assert call(monkeypatch, *words) == 0
    assert len(calls) == 4
    found = claims.read(files / "runs")
    assert (found["size"], found["seeds"], found["seeds_needed"]) == ("small", [0, 1], 2)
    assert {variant["config"]["train"]["steps"] for variant in found["variants"].values()} == {5}
    (verdict,) = claims.verdicts(found, results.read_runs(files / "runs", found))
    assert (
        f"{verdict.outcome.upper()}: test accuracy (last): bn - no_bn is greater than 0"
        in capsys.readouterr().out
    )
    assert (
        grid.compare_claim(str(files / "claim.py"), [], full=True)["variants"]["bn"]["config"][
            "train"
        ]["steps"]
        == 9
    )
    (files / "claim.py").write_text(
        f"def get_claim():\n    return {CLAIM | {'statements': [STATEMENT | {'margin': 0.5}]}!r}\n"
    )
    with pytest.raises(UserError, match=r"statements\.1\.margin: 0 there, 0\.5 now"):
        call(monkeypatch, *words)


def test_equal_seeds_have_equal_initial_values_and_order(files):
    """Also where the variants differ: what they share is drawn alike."""
    comparison = grid.compare_configs([str(files / "bn.py"), str(files / "no_bn.py")], [])
    kernels = []
    for variant in comparison["variants"].values():
        experiment = build.experiment(parsing.from_dict(variant["config"]), synthetic.dataset())
        init_key, _ = jax.random.split(jax.random.key(3))
        state, _ = init_state(
            experiment.model, experiment.tx, init_key, synthetic.dataset().train.image[:1]
        )
        kernels.append(state.params["conv0"]["kernel"])
    assert (kernels[0] == kernels[1]).all()


def test_a_run_that_breaks_down_does_not_end_the_others(files, monkeypatch, capsys):
    def breaking(config, dataset, workdir):
        if config.name == "bn":
            return NonFiniteError("step 3 gave a loss that is not finite.")
        return pretend(config, dataset, workdir)

    instead(monkeypatch, breaking)
    assert call(monkeypatch, *both(files), "--seeds", 1) == 1
    out, err = capsys.readouterr()
    assert "bn, seed 0: step 3 gave" in err
    assert "no_bn on synthetic: 1 of 1 runs finished" in out


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
def test_mistakes_show_before_anything_is_trained(files, calls, monkeypatch, words, said):
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        call(monkeypatch, *both(files), *words)
    assert calls == []
    assert not (files / "runs").exists()


def test_two_configs_of_one_name_are_refused(files):
    with pytest.raises(UserError, match="same name: bn, bn"):
        grid.compare_configs([str(files / "bn.py")] * 2, [])


def test_ctrl_c_is_no_error_between_two_runs_either(files, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    instead(monkeypatch, interrupted)
    assert call(monkeypatch, *both(files)) == 130
    assert "To go on:" in capsys.readouterr().out
    assert issubclass(Stopped, Exception)


def test_damaged_results_are_named(files, calls, monkeypatch):
    call(monkeypatch, *both(files), "--seeds", 1)
    found = claims.read(files / "runs")
    for name, content in (
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("metrics.jsonl", ""),
        ("timing.jsonl", '{"step": 1}\n'),
    ):
        file = files / "runs" / "bn" / "0" / name
        before = file.read_bytes()
        file.write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            results.read_runs(files / "runs", found)
        file.write_bytes(before)
