"""Reports about runs whose files are made up, so that every number in them is known."""

import html
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_runs import comparison, statement, write_run
from scipy import stats

from bnjax.compare import report, runs
from bnjax.compare.runs import read_run, read_study
from bnjax.errors import UserError
from bnjax.train import parsing

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three runs of bn, which reach the target loss, and two of no_bn, which do not."""
    home = tmp_path_factory.mktemp("made")
    bn = [
        write_run(home / "bn" / str(seed), seed, losses=(2.0, 1.0, 0.5, 0.25, 0.2 - seed / 100))
        for seed in range(3)
    ]
    plain = {"name": "no_bn", "model__norm": "none", "losses": (3.0, 2.0, 1.9, 1.5)}
    return bn + [write_run(home / "no_bn" / str(seed), seed, **plain) for seed in (1, 2)]


@pytest.fixture(scope="module")
def study(made):
    return read_study(made)


def cells(table):
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def rows_of(panel, variant=None):
    (rows,) = panel.to_dict()["datasets"].values()
    return [row for row in rows if variant in (None, row.get("variant"))]


def test_results_are_means_with_student_intervals(study, made, tmp_path):
    table = cells(report.results(study))
    losses = [0.2, 0.19, 0.18]
    low, high = stats.t.interval(0.95, 2, np.mean(losses), stats.sem(losses))
    assert table["bn"]["final training loss"] == f"0.1900 [{low:.4f} to {high:.4f}]"
    assert table["bn"]["final test accuracy"] == "0.5140 [0.4891 to 0.5388]"  # on the logit scale
    assert table["bn"]["final test loss"] == "0.350 [0.350 to 0.350]"
    assert table["no_bn"]["best test loss"] == "1.600 [1.600 to 1.600]"
    assert (table["bn"]["runs"], table["bn"]["steps"]) == ("3", "5")
    write_run(tmp_path / "3", 3, losses=(2.0, 1.0, 0.5, 0.25, 0.25))
    young = write_run(tmp_path / "4", 4, losses=(2.0,), finished=False, train__steps=5)
    study = read_study([*made, tmp_path / "3", young])
    table = cells(report.results(study))
    assert table["bn"]["runs"] == "4 of 5 finished"
    assert table["bn"]["steps to training loss 0.2"] == "5 (3 of 4 reached it)"
    assert table["no_bn"]["steps to training loss 0.2"] == "not reached"
    (panel,) = report.steps_to_loss(study).panels
    marks = [(row["variant"], row["step"], row["reached"]) for row in rows_of(panel)]
    late = (("bn", 5), ("bn", 1), ("no_bn", 4), ("no_bn", 4))
    never = [(*one, "not reached so far") for one in late]
    assert marks == [("bn", 5, "reached")] * 3 + never


def test_curves_are_means_and_ranges_over_the_seeds(study, tmp_path):
    train_loss, test_loss, _, test_accuracy = report.curves(study).panels
    *_, last = rows_of(train_loss, "bn")
    assert last == {"variant": "bn", "step": 5, "value": 0.19, "low": 0.18, "high": 0.2}
    assert [row["step"] for row in rows_of(test_loss, "no_bn")] == [2, 4]
    first, _ = rows_of(test_accuracy, "bn")
    assert first == {"variant": "bn", "step": 2, "value": 0.512, "low": 0.502, "high": 0.522}
    # Long ones are averaged over neighbours.
    losses = np.linspace(5, 1, 1000)
    folder = write_run(tmp_path / "long", losses=losses.tolist(), inside=False)
    panel, *_ = report.curves(read_study([folder])).panels
    for key, of in (("value", np.mean), ("high", np.max)):
        found = [row[key] for row in rows_of(panel)]
        np.testing.assert_allclose(found, of(losses.reshape(250, 4), 1), rtol=1e-4)


def test_what_the_averages_cost_is_stored_minus_batch(tmp_path):
    file = write_run(tmp_path / "run") / "metrics.jsonl"
    own = {"batch_loss": 1.0, "batch_accuracy": 0.75, "count": 4}
    gap = {"step": 2, "split": "gap", "loss": 1.5, "accuracy": 0.5, **own}
    gap["drift_mean"] = {"first": 0.5, "last": None}
    gap["drift_variance"] = {"first": 0.0, "last": 2.0}
    file.write_text(file.read_text() + json.dumps(gap) + "\n")
    cost, drifts = report.averages_figures(read_study([tmp_path / "run"]))
    assert [rows_of(panel)[0]["value"] for panel in cost.panels] == [0.5, 0.25]
    found = [[(row["variant"], row["value"]) for row in rows_of(panel)] for panel in drifts.panels]
    assert found == [[("first", 0.5)], [("first", 0), ("last", 2)]]


def test_gap_time_and_rate(study):
    (panel,) = report.gap(study).panels
    found = [rows_of(panel, name)[at]["value"] for name, at in (("bn", 1), ("no_bn", 0))]
    assert found == pytest.approx([0.35 - np.mean([2.0, 1.0, 0.5, 0.25]), 2.1 - 2.5])
    row = cells(report.speed(study))["bn"]
    assert (row["seconds"], row["images per second"]) == ("13.0 [13.0 to 13.0]", "5 [5 to 5]")
    loss, _ = report.against_time(study).panels
    found = [(row["seconds"], row["value"]) for row in rows_of(loss, "no_bn")]
    assert found == [(5, 3.0), (7, 2.0), (9, 1.9), (11, 1.5)]


def test_what_went_on_inside_is_what_the_files_say(study):
    figures = {figure.name: figure for figure in report.inside_figures(study)}
    kinds = ("running_mean", "running_variance", "activation", "gradient")
    assert {*figures} == {f"{what}_{of}" for what in kinds for of in ("bn", "no_bn")}
    fan, written = rows_of(figures["running_variance_bn"].panels[0]), study.runs[0].histograms
    medians = [line["statistic"]["norm.var"]["quantiles"][4] for line in written]
    assert [(row["step"], row["value"]) for row in fan] == [*zip((2, 4), medians, strict=True)]
    heat = rows_of(figures["gradient_bn"].panels[0])
    for line in written:
        shares = [row["share"] for row in heat if row["step"] == line["step"]]
        assert sum(shares) == pytest.approx(1, abs=1e-3)
        counts = line["gradient"]["conv.kernel"]["counts"]
        assert [round(50 * share) for share in shares] == [count for count in counts if count]


def test_the_difference_between_variants_is_shown_and_the_pixels_are_named(study):
    assert report.differences(study).rows == [
        ["model.norm", "batch", "none"],
        ["name", "bn", "no_bn"],
        ["train.steps", "5", "4"],
    ]
    pixels = "the digits, not the official pixels"
    assert report.origins(study).rows[0] == ["bn", pixels, "python 3.11", "abc1234"]


def test_a_command_gives_the_same_config_again(study, tmp_path):
    for run, line in zip(study.runs, report.commands(study), strict=True):
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "bnjax.main"]
        assert words[-2:] == ["--workdir", str(run.folder)]
        config = parsing.load(words[4], words[5:-2])
        assert parsing.flat({"config": config.to_dict()}) == run.config
    # On data that stood in: the command gives the name of those that were asked for.
    stood_in = {"data__name": "cifar10", "data__fallback": "synthetic"}
    run = read_run(write_run(tmp_path / "run", name="bn-synthetic", **stood_in))
    words = runs.command(run)
    assert parsing.load(words[4], words[5:]).name == "bn"


def test_comparisons_have_their_order_commands_and_verdicts(tmp_path):
    for folder, margin in (("first", 0.02), ("second", 0.005)):
        for name, steps in (("a", 4), ("b", 14)):  # 0.01 in accuracy
            for seed in range(2):
                run = tmp_path / folder / name / str(seed)
                write_run(run, seed, name=name, losses=(margin,) * steps, train__target_loss=margin)
        stated = statement(of="b", against="a", margin=margin)
        content = comparison("ba", stated, seeds=2, needed=2, question=folder, command=folder)
        (tmp_path / folder / "comparison.json").write_text(json.dumps(content))
    study = read_study([tmp_path / "first", tmp_path / "second"])
    order = [(run.folder.parent.name, run.seed) for run in study.runs]
    assert order == [("b", 0), ("b", 1), ("a", 0), ("a", 1)] * 2
    assert report.commands(study) == ["first", "second"]
    # Of one name, and of two configs.
    assert [*study.variants] == [
        f"{name} ({tmp_path / folder})" for folder in ("first", "second") for name in "ba"
    ]
    table = cells(report.verdict_table(study))
    assert {key: (row["verdict"], row["found"]) for key, row in table.items()} == {
        "first (small size)": ("not reproduced", "0.01 [0.01 to 0.01], 2 pairs"),
        "second (small size)": ("reproduced", "0.01 [0.01 to 0.01], 2 pairs"),
    }
    # Runs that another folder has as well are shown once, and count for both comparisons.
    shutil.copytree(tmp_path / "second", tmp_path / "third")
    twice = read_study([tmp_path / "second", tmp_path / "third"])
    assert len(twice.runs) == len(twice.problems) == 4
    assert [row[2] for row in report.verdict_table(twice).rows] == ["reproduced"] * 2
    assert report.effects(twice) is None
    plain = comparison("ba", seeds=3)
    (tmp_path / "first" / "comparison.json").write_text(json.dumps(plain))
    again = read_study([tmp_path / "first", tmp_path / "first" / "b" / "1"])
    missing, twice = again.problems
    assert missing == f"the comparison {tmp_path / 'first'} has not started b/2, a/2."
    assert f"{tmp_path / 'first' / 'b' / '1'} has the same config and seed" in twice
    assert report.verdict_table(again) is None
    assert report.effects(again).rows == [["a - b", "-0.01 [-0.01 to -0.01]", "2"]]


def test_files_that_do_not_agree_are_no_finished_run(tmp_path):
    folder = write_run(tmp_path / "bn" / "0", inside=False)
    (run,) = runs.finished_runs(tmp_path, comparison(["bn"], seeds=1))
    assert run.summary["steps"] == 5
    lines = (folder / "timing.jsonl").read_text().splitlines(keepends=True)
    (folder / "timing.jsonl").write_text("".join(lines[:3]))  # as if the disk had lost the rest
    with pytest.raises(UserError, match="have different steps"):
        read_run(folder)
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is damaged"):
        runs.finished_runs(tmp_path, comparison(["bn"], seeds=1))


def test_what_is_wrong_is_told_and_the_others_are_reported(made, tmp_path):
    (tmp_path / "empty").mkdir()
    young = write_run(tmp_path / "young", finished=False, name="young", inside=False)
    damaged = write_run(tmp_path / "damaged")
    (damaged / "metrics.jsonl").write_text('{"step"\n')
    not_begun = write_run(tmp_path / "not_begun", losses=())
    study = read_study([tmp_path / "empty", made[0], young, damaged, not_begun])
    assert [*study.variants] == ["bn", "young"]
    wanted = (
        f"there is no run in {tmp_path / 'empty'}",
        f"{young} is not finished; the report shows its results after 5 steps",
        f"{damaged / 'metrics.jsonl'} is damaged",
        f"the run in {not_begun} has no training step yet",
    )
    assert all(said in problem for said, problem in zip(wanted, study.problems, strict=True))


def test_the_page_needs_nothing_else_and_markdown_has_its_pictures(made, study, tmp_path):
    page, (problem,) = report.write([*made, tmp_path / "nowhere"], tmp_path)
    text = page.read_text()
    assert html.escape(problem) in text
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"https?://|<link|@import|src=|url\(", body)
    assert text.count("<script>") == text.count("</script>") == 2
    assert len(text) < 2_000_000
    specs = json.loads(re.search(r"const charts = (\{.*\});", text)[1])
    assert {*specs} == {*re.findall(r'class="chart" id="([^"]+)"', body)}
    markdown = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert len(pictures) == 12
    for picture in pictures:
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    for table in (report.results(study), report.speed(study)):
        assert "| " + " | ".join(table.rows[0]) + " |" in markdown
        assert all(f"<td>{cell}</td>" in body for cell in table.rows[0])


def test_names_are_text_and_a_report_of_somebody_else_is_not_overwritten(bnjax, tmp_path):
    name = "</script><script>alert('x')</script>|<b><!--"
    folder = write_run(tmp_path / "run", name=name, inside=False)
    (folder / "report.html").write_text(report.MARK)  # an earlier one, which is replaced
    assert bnjax("report", folder)[:2] == (0, f"written: {folder / 'report.html'}\n")
    text = (folder / "report.html").read_text()
    assert text.count("<script") == text.count("</script") == 2
    assert text.count("<!--") == 1  # the mark; within a script it would hide the script's end
    assert html.escape(name, quote=False).split("'")[0] in text
    assert "\\|&lt;b>" in (folder / "report.md").read_text()
    (tmp_path / "report.md").write_text("# my own")
    with pytest.raises(UserError, match="was not made by bnjax report"):
        report.write([folder], tmp_path)
    code, _, error = bnjax("report", folder, "--out", folder / "config.json")
    assert (code, "config.json" in error and "cannot be read or written" in error) == (1, True)


def test_reports_need_no_jax():
    code = "import sys, bnjax.compare.report; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
