"""Reports about runs whose files are made up, so that every number in them is known."""

import html
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from strategies import JSON

import bnjax.compare
from bnjax import main
from bnjax.compare import report
from bnjax.compare.runs import finished_runs, read_run, read_study, time, with_histograms
from bnjax.errors import UserError
from bnjax.train import diagnostics, parsing

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)


def write_run(
    folder, seed=0, *, name="bn", losses=(2.0, 1.0, 0.5, 0.25, 0.125), finished=True, **changes
):
    """Makes a run of a step for each loss.

    It is evaluated after every second step, with a test loss 0.1 above the training loss.
    """
    config = synthetic.config(steps=len(losses))
    config.name, config.seed = name, seed
    for key, value in changes.items():
        section, _, leaf = key.partition("__")
        config[section][leaf] = value
    folder.mkdir(parents=True)
    data = {
        "name": "synthetic",
        "label": "the digits",
        "image_shape": [8, 8, 1],
        "classes": ["a", "b"],
    }
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict(), "data": data}))
    lines, timing, inner = [], [], []
    for step, loss in enumerate(losses, start=1):
        lines.append({"step": step, "split": "train", "loss": loss, "accuracy": 1 - loss / 4})
        timing.append({"step": step, "seconds": 3.0 + 2.0 * step, "images_per_s": 5.0})
        if step % 2 == 0:
            lines.append(
                {
                    "step": step,
                    "split": "test",
                    "loss": loss + 0.1,
                    "accuracy": 0.5 + seed / 100 + step / 1000,
                    "count": 20,
                }
            )
            values = {"norm.mean": RNG.normal(size=9), "norm.var": RNG.uniform(size=9)}
            kinds = {
                "statistic": values,
                "activation": {"conv": RNG.normal(size=99)},
                "gradient": {"conv.kernel": RNG.normal(size=50)},
            }
            inner.append({"step": step, **diagnostics.summarise(kinds)})
    for file, content in (("metrics", lines), ("timing", timing), ("histograms", inner)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    if finished:
        summary = {
            "official_pixels": False,
            "fallback_reason": "",
            "batch_size": 10,
            "steps": len(losses),
            "device": "1 x abacus",
            "git": "abc1234",
        }
        (folder / "summary.json").write_text(
            json.dumps(summary | {"versions": {"python": "3.11", "jax": "0.10.2"}})
        )
    return folder


@pytest.fixture
def folders(tmp_path):
    bn = [
        write_run(tmp_path / "bn" / str(seed), seed, losses=(2.0, 1.0, 0.5, 0.25, 0.2 - seed / 100))
        for seed in range(3)
    ]
    plain = [
        write_run(
            tmp_path / "no_bn" / str(seed),
            seed,
            name="no_bn",
            model__norm="none",
            losses=(3.0, 2.0, 1.9, 1.5),
        )
        for seed in range(2)
    ]
    return [*bn, *plain]


def cells(table):
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def rows_of(panel, layer=0):
    spec = panel.to_dict()
    data = spec["layer"][layer].get("data") or spec["data"]
    return data["values"] if "values" in data else spec["datasets"][data["name"]]


def test_results_are_means_with_student_intervals(folders):
    table = cells(report.results(read_study(folders)))
    accuracies = [0.504, 0.514, 0.524]  # 0.5 + seed / 100 + 4 / 1000
    low, high = stats.t.interval(0.95, 2, np.mean(accuracies), stats.sem(accuracies))
    assert table["bn"]["final test accuracy"] == f"{(low + high) / 2:.4f} ± {(high - low) / 2:.4f}"
    assert table["bn"]["final test loss"] == "0.350 ± 0.000"
    assert table["no_bn"]["best test loss"] == "1.600 ± 0.000"
    assert table["bn"]["runs"] == "3"
    assert table["bn"]["steps"] == "5"


def test_steps_to_a_loss_and_runs_that_never_got_there(folders, tmp_path):
    write_run(tmp_path / "bn" / "3", 3, losses=(2.0, 1.0, 0.5, 0.25, 0.25))
    study = read_study([*folders, tmp_path / "bn" / "3"])
    found = [time(run, "steps_to_loss", run.target_loss) for run in study.runs]
    assert found == [(5, True)] * 3 + [(5, False)] + [(4, False)] * 2
    table = cells(report.results(study))
    assert table["bn"]["steps to training loss 0.2"] == "5 (3 of 4 got there)"
    assert table["no_bn"]["steps to training loss 0.2"] == "not reached"
    (panel,) = report.steps_to_loss(study).panels
    marks = [(row["variant"], row["step"], row["reached"]) for row in rows_of(panel)]
    assert (
        marks
        == [("bn", 5, "reached")] * 3
        + [("bn", 5, "not reached so far")]
        + [("no_bn", 4, "not reached so far")] * 2
    )


def test_curves_are_means_and_ranges_over_the_seeds(folders):
    train_loss, test_loss, _, test_accuracy = report.curves(read_study(folders)).panels
    last = [row for row in rows_of(train_loss) if (row["variant"], row["x"]) == ("bn", 5)]
    assert [(row["mean"], row["low"], row["high"]) for row in last] == [(0.19, 0.18, 0.2)]
    assert [row["x"] for row in rows_of(test_loss) if row["variant"] == "no_bn"] == [2, 4]
    second = [row for row in rows_of(test_accuracy) if (row["variant"], row["x"]) == ("bn", 2)]
    assert [(row["mean"], row["low"], row["high"]) for row in second] == [(0.512, 0.502, 0.522)]


def test_long_curves_are_averaged_over_neighbours(tmp_path):
    losses = np.linspace(5, 1, 1000)
    panel, *_ = report.curves(
        read_study([write_run(tmp_path / "long", losses=losses.tolist())])
    ).panels
    rows = rows_of(panel)
    assert len(rows) == 250
    np.testing.assert_allclose(
        [row["mean"] for row in rows], losses.reshape(250, 4).mean(1), rtol=1e-4
    )
    np.testing.assert_allclose(
        [row["high"] for row in rows], losses.reshape(250, 4).max(1), rtol=1e-4
    )


def test_the_gap_is_the_test_loss_above_the_training_loss(folders):
    (panel,) = report.gap(read_study(folders)).panels
    gaps = {(row["variant"], row["x"]): row["mean"] for row in rows_of(panel)}
    assert gaps["bn", 4] == pytest.approx(0.35 - np.mean([2.0, 1.0, 0.5, 0.25]))
    assert gaps["no_bn", 2] == pytest.approx(2.1 - 2.5)


def test_what_the_averages_cost_is_stored_minus_batch(tmp_path):
    write_run(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    own = {"batch_loss": 1.0, "batch_accuracy": 0.75, "count": 4}
    drift = {
        "drift_mean": {"first": 0.5, "last": None},
        "drift_variance": {"first": 1.0, "last": 2.0},
    }
    gap = {"step": 2, "split": "gap", "loss": 1.5, "accuracy": 0.5, **own, **drift}
    at = next(i for i, line in enumerate(lines) if json.loads(line)["split"] == "test")
    lines.insert(at + 1, json.dumps(gap))
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    study = read_study([tmp_path / "run"])
    cost, drifts = report.averages_figures(study)
    means = [panel.to_dict() for panel in cost.panels]
    values = [next(iter(one["datasets"].values()))[0]["mean"] for one in means]
    assert values == [0.5, 0.25]
    shown = [next(iter(panel.to_dict()["datasets"].values())) for panel in drifts.panels]
    assert [[(row["norm"], row["y"]) for row in rows] for rows in shown] == [
        [("first", 0.5)],
        [("first", 1), ("last", 2)],
    ]


def test_time_and_rate(folders):
    table = cells(report.speed(read_study(folders)))
    assert table["bn"] == {
        "variant": "bn",
        "seconds": "13.0 ± 0.0",
        "images a second": "5 ± 0",
        "device": "1 x abacus",
    }
    loss, _ = report.against_time(read_study(folders)).panels
    assert [(row["x"], row["mean"]) for row in rows_of(loss) if row["variant"] == "no_bn"] == [
        (5, 3.0),
        (7, 2.0),
        (9, 1.9),
        (11, 1.5),
    ]


def test_what_went_on_inside_is_what_the_files_say(folders):
    study = read_study(folders)
    figures = {figure.name: figure for figure in report.inside_figures(study)}
    assert set(figures) == {
        f"{what}_{of}"
        for what in ("running_mean", "running_variance", "activation", "gradient")
        for of in ("bn", "no_bn")
    }
    fan = rows_of(figures["running_variance_bn"].panels[0])
    lines = study.runs[0].histograms
    assert [row["step"] for row in fan] == [2, 4]
    assert [row["median"] for row in fan] == [
        line["statistic"]["norm.var"]["quantiles"][4] for line in lines
    ]
    heat = rows_of(figures["gradient_bn"].panels[0])
    for line in lines:
        mine = [row for row in heat if row["step"] == line["step"]]
        assert sum(row["share"] for row in mine) == pytest.approx(1, abs=1e-3)
        assert [round(50 * row["share"]) for row in mine] == [
            count for count in line["gradient"]["conv.kernel"]["counts"] if count
        ]


def test_the_difference_between_variants_is_shown_and_the_pixels_are_named(folders):
    study = read_study(folders)
    assert report.differences(study).rows == [
        ["model.norm", "batch", "none"],
        ["name", "bn", "no_bn"],
        ["train.steps", "5", "4"],
    ]
    assert report.origins(study).rows[0][1:] == [
        "the digits, not the official pixels",
        "python 3.11 jax 0.10.2",
        "abc1234",
    ]


def test_a_command_gives_the_same_config_again(folders):
    study = read_study(folders)
    for run, line in zip(study.runs, report.commands(study), strict=True):
        words = shlex.split(line)
        assert words[:3] + words[-2:] == [
            "python",
            "-m",
            "bnjax.main",
            "--workdir",
            str(run.folder),
        ]
        config = parsing.load(str(ROOT / words[4]), words[5:-2])
        assert parsing.flat({"config": config.to_dict()}) == run.config


def test_the_command_of_a_run_on_the_data_that_stood_in_is_accepted_by_its_folder(tmp_path):
    """Nothing can be downloaded into a cache that is a file."""
    (tmp_path / "cache").touch()
    env = {**os.environ, "BNJAX_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    few = ["--config.model.filters=2,2,2", "--config.model.dense=4,4", "--config.train.steps=2"]
    few += ["--config.eval.every_epochs=0", "--config.eval.every_steps=2"]

    def call(*words):
        return subprocess.run(
            words, capture_output=True, text=True, check=False, cwd=ROOT, env=env, timeout=240
        )

    train = [sys.executable, "-m", "bnjax.main", "--config", "configs/bn.py", *few]
    first = call(*train, "--workdir", str(tmp_path / "run"))
    assert first.returncode == 0, first.stderr
    study = read_study([tmp_path / "run"])
    assert study.runs[0].config["config.name"] == "bn-digits"
    (line,) = report.commands(study)
    python, *words = shlex.split(line)
    assert python == "python"
    again = call(sys.executable, *words)
    assert again.returncode == 0, again.stderr
    assert f"{tmp_path / 'run'} is finished" in again.stdout


def test_a_comparison_has_its_own_order_and_command_and_says_what_is_missing(folders, tmp_path):
    variant = {"config": {"train": {"target_loss": 0.2}}, "dataset": "the digits", "differs": {}}
    comparison = {
        "variants": {"no_bn": variant, "bn": variant},
        "seeds": [0, 1, 2],
        "command": "bnjax compare --configs a,b",
    }
    comparison |= {"question": "", "size": "", "statements": [], "seeds_needed": 0}
    (tmp_path / "comparison.json").write_text(json.dumps(comparison))
    study = read_study([tmp_path])
    assert [(run.variant, run.seed) for run in study.runs] == [
        ("no_bn", 0),
        ("no_bn", 1),
        ("bn", 0),
        ("bn", 1),
        ("bn", 2),
    ]
    assert report.commands(study) == [comparison["command"]]
    assert study.problems == [f"the comparison {tmp_path} has not begun no_bn/2."]
    assert report.verdict_table(study) is None


def test_the_verdicts_of_several_comparisons_stand_in_one_table(tmp_path):
    for folder, question, margin in (
        ("first", "Is it much better?", 0.02),
        ("second", "Is it better?", 0.005),
    ):
        for name, steps in (
            ("a", 14),
            ("b", 4),
        ):  # an accuracy of 0.5 + seed / 100 + steps / 1000 at the end
            for seed in range(2):
                write_run(
                    tmp_path / folder / name / str(seed), seed, name=name, losses=(1.0,) * steps
                )
        variant = {
            "config": {"train": {"target_loss": 0.2}},
            "dataset": "the digits",
            "differs": {},
        }
        statement = {
            "quantity": "test_accuracy",
            "at": "last",
            "of": "a",
            "against": "b",
            "direction": "greater",
            "margin": margin,
        }
        comparison = {
            "question": question,
            "size": "small",
            "variants": {"a": variant, "b": variant},
            "statements": [{**statement, "source": "me"}],
            "seeds": [0, 1],
            "seeds_needed": 2,
            "command": "bnjax compare",
        }
        (tmp_path / folder / "comparison.json").write_text(json.dumps(comparison))
    table = report.verdict_table(read_study([tmp_path / "first", tmp_path / "second"]))
    verdicts = {question: (row["verdict"], row["found"]) for question, row in cells(table).items()}
    assert verdicts == {
        "Is it much better? (small size)": ("not reproduced", "0.01 [0.01 to 0.01], 2 pairs"),
        "Is it better? (small size)": ("reproduced", "0.01 [0.01 to 0.01], 2 pairs"),
    }


def test_one_name_in_two_comparisons_is_told_apart(tmp_path):
    for folder, batch_size in (("small", 10), ("large", 20)):
        for seed in range(2):
            write_run(tmp_path / folder / "bn" / str(seed), seed, train__batch_size=batch_size)
        (tmp_path / folder / "comparison.json").write_text(
            json.dumps({"variants": {"bn": {}}, "seeds": [0, 1]})
        )
    study = read_study([tmp_path / "small", tmp_path / "large"])
    assert {name: len(runs) for name, runs in study.variants.items()} == {
        f"bn ({tmp_path / folder})": 2 for folder in ("small", "large")
    }
    again = read_study([tmp_path / "small", tmp_path / "small" / "bn" / "1"])
    assert {name: len(runs) for name, runs in again.variants.items()} == {"bn": 2}
    assert f"{tmp_path / 'small' / 'bn' / '1'} is of the same config and seed" in again.problems[-1]


def test_files_that_do_not_agree_are_no_finished_run(tmp_path):
    folder = write_run(tmp_path / "bn" / "0")
    variant = {"config": {"train": {"target_loss": 0.2}}, "dataset": "the digits", "differs": {}}
    comparison = {"variants": {"bn": variant}, "seeds": [0]}
    assert [run.summary["steps"] for run in finished_runs(tmp_path, comparison)] == [5]
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]))  # as if the disk had lost the rest
    assert "is of 5 steps, and metrics.jsonl ends at step 2" in read_run(folder).problems[0]
    assert not read_run(folder).summary
    with pytest.raises(UserError, match="is damaged"):
        finished_runs(tmp_path, comparison)
    (folder / "metrics.jsonl").write_text("".join(lines))
    folder.rename(tmp_path / "bn" / "1")
    with pytest.raises(UserError, match="one finished run of seed 1"):
        finished_runs(tmp_path, comparison | {"seeds": [1]})


def test_a_report_of_somebody_else_is_not_overwritten(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "histograms.jsonl").unlink()  # fewer pictures
    report.write(folder)
    report.write(folder)  # its own it replaces
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("# my own")
    with pytest.raises(UserError, match=r"was not made by bnjax\.report"):
        report.write_all([folder], tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["report.md"]
    with pytest.raises(UserError, match="cannot be written"):
        report.write_all([folder], folder / "config.json")


def test_verdicts_that_cannot_be_had_are_said(tmp_path):
    write_run(tmp_path / "bn" / "0")
    (tmp_path / "comparison.json").write_text(json.dumps({"variants": {"bn": {}}, "seeds": [0]}))
    ((folder, _, verdict, _, reason, _),) = report.verdict_table(read_study([tmp_path])).rows
    assert (folder, verdict) == (str(tmp_path), "not known")
    assert "comparison.json is missing or damaged (KeyError" in reason


def test_one_name_for_two_configs_is_told_apart_and_seeds_are_not(folders, tmp_path):
    other = write_run(tmp_path / "wide", model__dense=(80,))
    variants = read_study([*folders[:3], other]).variants
    assert {name: len(runs) for name, runs in variants.items()} == {
        f"bn ({folders[0]})": 3,
        f"bn ({other})": 1,
    }


def test_the_page_needs_nothing_else_and_markdown_has_its_pictures(folders, tmp_path):
    page, _ = report.write_all(folders, tmp_path / "out")
    text = page.read_text()
    assert page == tmp_path / "out" / "report.html"
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|<link|@import|src=|url\(", body)
    assert text.count("<script>") == text.count("</script>") == 2
    assert len(text) < 2_000_000
    specs = json.loads(re.search(r"const charts = (\{.*\});", text)[1])
    assert set(specs) == set(re.findall(r'class="chart" id="([^"]+)"', body))
    markdown = (tmp_path / "out" / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(pictures) == 12
    for picture in pictures:
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    for table in (report.results(read_study(folders)), report.speed(read_study(folders))):
        assert "| " + " | ".join(table.rows[0]) + " |" in markdown
        assert all(f"<td>{cell}</td>" in body for cell in table.rows[0])


def test_names_are_text_and_never_markup(tmp_path):
    name = "</script><script>alert('x')</script>|<b><!--"
    text = report.write(write_run(tmp_path / "run", name=name)).read_text()
    assert text.count("<script") == text.count("</script") == 2
    assert (
        text.count("<!--") == 1
    )  # the mark of a report; within a script it would hide the script's end
    assert html.escape(name, quote=False).split("'")[0] in text
    assert "\\|&lt;b>" in (tmp_path / "run" / "report.md").read_text()


def test_what_is_wrong_is_told_and_the_others_are_reported(folders, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    unfinished = write_run(tmp_path / "unfinished", finished=False, name="young")
    damaged = write_run(tmp_path / "damaged", name="broken")
    (damaged / "metrics.jsonl").write_text('{"step": 1}\n')
    partly = write_run(tmp_path / "partly", name="partly")
    for file in ("histograms.jsonl", "timing.jsonl"):
        (partly / file).write_text('{"step": 1, "activation": {"a": {}}, "seconds": "x"}\n')
    (partly / "summary.json").write_text("[")
    not_begun = write_run(tmp_path / "not_begun", losses=())
    study = read_study(
        [empty, folders[0], unfinished, damaged, partly, not_begun, tmp_path / "nowhere"]
    )
    assert [run.variant for run in study.runs] == ["bn", "young", "partly"]
    told = "\n".join(study.problems)
    for words in (
        f"there is no run in {empty}",
        f"{unfinished} is not finished: what it had after 5 steps is shown",
        "the line of step 1 of",
        f"{partly / 'histograms.jsonl'} is damaged",
        f"{partly / 'timing.jsonl'} is damaged",
        f"{partly / 'summary.json'} is damaged",
        f"the run in {not_begun} has no training step yet",
        f"there is no run in {tmp_path / 'nowhere'}",
    ):
        assert words in told
    (unfinished / "histograms.jsonl").unlink()  # fewer pictures
    page, problems = report.write_all([unfinished, empty], tmp_path / "out")
    assert problems == read_study([unfinished, empty]).problems
    assert html.escape(study.problems[1]) in page.read_text()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(folders, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "bnjax.compare.report", raising=False)
    monkeypatch.delattr(bnjax.compare, "report", raising=False)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UserError, match=r"needs vl_convert, .* pip install 'bnjax\[report\]'"):
        main.main(["report", str(folders[0]), "--out", str(tmp_path / "out")])


def test_the_command_runs_without_jax(folders, tmp_path):
    code = (
        "import sys; from bnjax import main\n"
        "sys.argv = ['bnjax', 'report', *sys.argv[1:]]\n"
        "assert main.main() == 0\n"
        "heavy = 'jax', 'flax', 'optax', 'orbax', 'tensorflow', 'torch'\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    arguments = [*folders[:1], "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"written: {tmp_path / 'out' / 'report.html'}", "[]"]


@pytest.mark.parametrize("arguments", [["nowhere"], []])
def test_nothing_to_report_is_an_error_without_a_traceback(tmp_path, arguments):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "bnjax.main", "report", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("template") / "bn" / "0"
    write_run(folder)
    statements = [
        {
            "quantity": quantity,
            "at": at,
            "of": "bn",
            "against": "bn",
            "direction": "greater",
            "margin": 1,
            "source": "me",
        }
        for quantity, at in (
            ("seconds_to_accuracy", 0.5),
            ("steps_to_loss", 0.3),
            ("test_loss", "best"),
        )
    ]
    variants = {
        "bn": {"config": {"train": {"target_loss": 0.2}}, "dataset": "the digits", "differs": {}}
    }
    comparison = {
        "question": "Is it?",
        "size": "small",
        "variants": variants,
        "statements": statements,
        "seeds": [0],
        "seeds_needed": 1,
    }
    (folder.parents[1] / "comparison.json").write_text(
        json.dumps(comparison | {"command": "bnjax compare"})
    )
    return folder


FILES = [
    "metrics.jsonl",
    "timing.jsonl",
    "histograms.jsonl",
    "summary.json",
    "config.json",
    "../../comparison.json",
]


@settings(max_examples=30)
@given(file=st.sampled_from(FILES), content=st.one_of(st.binary(max_size=60), st.data()))
def test_any_content_of_any_file_is_reported_or_refused(template, file, content):
    path = template / file
    before = path.read_bytes()
    if not isinstance(content, bytes):
        lines = (
            [json.loads(line) for line in before.splitlines()]
            if file.endswith("l")
            else [json.loads(before)]
        )
        line = content.draw(st.sampled_from(lines))
        line[content.draw(st.sampled_from(sorted(line)))] = content.draw(JSON)
        content = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    try:
        path.write_bytes(content)
        study = read_study([template.parents[1]])
        for table in (
            report.verdict_table,
            report.results,
            report.speed,
            report.origins,
            report.differences,
            report.whole_config,
        ):
            table(study)
        report.commands(study)
        for draw in (
            report.curves,
            report.steps_to_loss,
            report.gap,
            report.against_time,
            lambda study: [*report.averages_figures(study), *report.inside_figures(study)],
        ):
            draw(study)
    except UserError as error:
        assert str(error)
    finally:
        path.write_bytes(before)
    assert with_histograms(read_run(template)).problems == ()
