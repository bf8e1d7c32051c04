"""Variants over seeds in one folder: nothing is repeated, nothing is mixed up, and a run is what it is alone."""

import json
import signal

import jax
import pytest
import synthetic

from bnjax import claims, compare, grid, loop, report, results
from bnjax import config as configs
from bnjax import workdir as workdirs
from bnjax.errors import NonFiniteError, UserError
from bnjax.loop import Stopped, train_and_evaluate

CONFIG = "import synthetic\n\ndef get_config():\n    config = synthetic.config(steps=6)\n    config.name = ''\n"
FILES = {
    "bn": CONFIG + "    return config\n",
    "no_bn": CONFIG + "    config.model.norm = 'none'\n    return config\n",
}
STATEMENT = {"quantity": "test_accuracy", "at": "last", "of": "bn", "against": "no_bn", "direction": "greater", "margin": 0, "source": "me"}
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
    monkeypatch.setattr(configs, "load_data", lambda config: synthetic.dataset())
    monkeypatch.setattr(report, "write", lambda folder: folder / "report.html")  # takes seconds, and has tests of its own
    for name, content in FILES.items():
        (tmp_path / f"{name}.py").write_text(content)
    (tmp_path / "claim.py").write_text(f"def get_claim():\n    return {CLAIM!r}\n")
    return tmp_path


def pretend(config, workdir, dataset):
    """Leaves the folder of a finished run behind, whose accuracy tells the seed."""
    workdir.mkdir()
    workdirs.claim(workdir, config, workdirs.DataFacts.of(dataset))
    (workdir / "checkpoints" / "6").mkdir(parents=True)
    metrics = [{"step": 6, "split": split, "loss": 0.5, "accuracy": config.seed / 10} for split in ("train", "test")]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (workdir / "timing.jsonl").write_text('{"step": 6, "seconds": 1.5}\n')
    (workdir / "summary.json").write_text("{}")


def counting(monkeypatch, train):
    """Returns the (name, seed) of each run that is trained from now on."""
    seen = []

    def counted(config, workdir, dataset):
        seen.append((config.name, config.seed))
        return train(config, workdir, dataset)

    monkeypatch.setattr(loop, "train_and_evaluate", counted)
    return seen


@pytest.fixture
def calls(monkeypatch):
    return counting(monkeypatch, pretend)


@pytest.fixture
def trained(monkeypatch):
    return counting(monkeypatch, train_and_evaluate)


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["compare", *map(str, words)])
    return compare.main()


def both(files):
    return ["--configs", f"{files / 'bn.py'},{files / 'no_bn.py'}", "--workdir", files / "runs"]


def test_every_variant_has_a_run_for_every_seed_that_equals_the_solo_run(files, trained, monkeypatch, capsys):
    assert call(monkeypatch, *both(files), "--seeds", 2) == 0
    assert sorted(trained) == [("bn", 0), ("bn", 1), ("no_bn", 0), ("no_bn", 1)]
    said = capsys.readouterr().out
    assert "[3/4] bn, seed 1, about" in said
    assert "test accuracy at the end, no_bn - bn: " in said
    config = synthetic.config(steps=6)
    config.name, config.seed = "bn", 1
    train_and_evaluate(config, files / "solo", synthetic.dataset())
    assert (files / "runs" / "bn" / "1" / "metrics.jsonl").read_bytes() == (files / "solo" / "metrics.jsonl").read_bytes()
    found = claims.read(files / "runs")
    assert found["seeds"] == [0, 1]
    assert found["command"].startswith("python -m bnjax.compare --configs ")
    assert {name: variant["differs"] for name, variant in found["variants"].items()} == {
        "bn": {"model.norm": "batch"},
        "no_bn": {"model.norm": "none"},
    }
    assert all(variant["dataset"] == "synthetic" for variant in found["variants"].values())
    for run in (files / "runs").glob("*/*/checkpoints"):
        assert [path.name for path in run.iterdir()] == ["6"]  # the last one only


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
    stream = loop.train_rows

    def interrupting(*args, **kwargs):
        for step, batch in enumerate(stream(*args, **kwargs), start=1):
            if trained[-1] == ("no_bn", 0) and step == 3:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(loop, "train_rows", interrupting)
    assert call(monkeypatch, *both(files), "--seeds", 1) == 130
    said = capsys.readouterr().out
    assert "stopped by SIGINT after step 3; everything is saved. To go on:\n    python -m bnjax.compare --configs" in said
    monkeypatch.setattr(loop, "train_rows", stream)
    trained.clear()
    assert call(monkeypatch, *both(files), "--seeds", 1) == 0
    assert trained == [("no_bn", 0)]
    metrics = [json.loads(line) for line in (files / "runs/no_bn/0/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line["split"] == "train"] == [1, 2, 3, 4, 5, 6]


def test_another_comparison_in_the_folder_is_refused_with_the_difference(files, calls, monkeypatch):
    call(monkeypatch, *both(files), "--seeds", 1)
    calls.clear()
    with pytest.raises(UserError, match=r"variants\.bn\.config\.model\.momentum: 0\.75 there, 0\.9 now"):
        call(monkeypatch, *both(files), "--seeds", 1, "--config.model.momentum=0.9")
    (files / "other").mkdir()
    (files / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds thesis\.tex but no comparison"):
        call(monkeypatch, *both(files)[:-1], files / "other")
    assert calls == []


def test_a_claim_is_tried_small_or_full_and_is_fixed_before_the_runs(files, calls, monkeypatch, capsys):
    words = ["--claim", files / "claim.py", "--workdir", files / "runs"]
    assert call(monkeypatch, *words) == 0
    assert len(calls) == 4
    found = claims.read(files / "runs")
    assert (found["size"], found["seeds"], found["seeds_needed"]) == ("small", [0, 1], 2)
    assert {variant["config"]["train"]["steps"] for variant in found["variants"].values()} == {5}
    (verdict,) = claims.verdicts(found, results.read_runs(files / "runs", found))
    assert f"{verdict.outcome.upper()}: test accuracy (last): bn - no_bn is greater than 0" in capsys.readouterr().out
    assert grid.compare_claim(str(files / "claim.py"), [], full=True)["variants"]["bn"]["config"]["train"]["steps"] == 9
    (files / "claim.py").write_text(f"def get_claim():\n    return {CLAIM | {'statements': [STATEMENT | {'margin': 0.5}]}!r}\n")
    with pytest.raises(UserError, match=r"statements\.1\.margin: 0 there, 0\.5 now"):
        call(monkeypatch, *words)


def test_equal_seeds_have_equal_initial_values_and_order(files):
    """Also where the variants differ: what they share is drawn alike."""
    comparison = grid.compare_configs([str(files / "bn.py"), str(files / "no_bn.py")], [])
    kernels = []
    for variant in comparison["variants"].values():
        experiment = configs.build(grid.configfile.from_dict(variant["config"]), synthetic.dataset())
        init_key, _ = jax.random.split(jax.random.key(3))
        state, _ = loop.init_state(experiment.model, experiment.tx, init_key, synthetic.dataset().train.image[:1])
        kernels.append(state.params["conv0"]["kernel"])
    assert (kernels[0] == kernels[1]).all()


def test_a_run_that_breaks_down_does_not_end_the_others(files, monkeypatch, capsys):
    def breaking(config, workdir, dataset):
        if config.name == "bn":
            raise NonFiniteError("step 3 gave a loss that is not finite.")
        return pretend(config, workdir, dataset)

    monkeypatch.setattr(loop, "train_and_evaluate", breaking)
    assert call(monkeypatch, *both(files), "--seeds", 1) == 1
    out, err = capsys.readouterr()
    assert "bn, seed 0: step 3 gave" in err
    assert "no_bn on synthetic: 1 of 1 runs finished" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config.seed=3"], "Say how many with --seeds"),
        (["--config.train.batch_size=4000"], "bn cannot be trained: config.train.batch_size = 4000"),
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

    monkeypatch.setattr(loop, "train_and_evaluate", interrupted)
    assert call(monkeypatch, *both(files)) == 130
    assert "To go on:" in capsys.readouterr().out
    assert issubclass(Stopped, Exception)


def test_damaged_results_are_named(files, calls, monkeypatch):
    call(monkeypatch, *both(files), "--seeds", 1)
    found = claims.read(files / "runs")
    for name, content in (("summary.json", "{"), ("summary.json", "[]"), ("metrics.jsonl", ""), ("timing.jsonl", '{"step": 1}\n')):
        file = files / "runs" / "bn" / "0" / name
        before = file.read_bytes()
        file.write_text(content)
        with pytest.raises(UserError, match="is damaged"):
            results.read_runs(files / "runs", found)
        file.write_bytes(before)
