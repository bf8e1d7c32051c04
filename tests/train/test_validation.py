"""Images set aside for validation, patience, and the function that is called with the metrics."""

import json

import numpy as np
import pytest
import synthetic
from synthetic import assert_same_metrics, lines

from bnjax.compare import report, runs
from bnjax.data import datasets
from bnjax.errors import ConfigError
from bnjax.train import build
from bnjax.train.jsonl import read_lines
from bnjax.train.loop import train_and_evaluate


def config():
    made = synthetic.config(steps=6)
    made.data.update(name="digits", validation=100)
    made.train.batch_size, made.eval.every_steps, made.eval.gap_images = 64, 2, 16
    return made


def test_classes_are_set_aside_in_proportion_and_nothing_is_lost():
    whole = datasets.load("digits")
    made = datasets.with_validation(whole, 200, seed=3)
    aside, kept = np.bincount(made.validation.label), np.bincount(made.train.label)
    shares = aside / np.bincount(whole.train.label)
    assert np.abs(shares - 200 / len(whole.train)).max() < 1 / kept.min()
    together = [*made.train.image, *made.validation.image]
    assert sorted(map(bytes, together)) == sorted(map(bytes, whole.train.image))
    for seed in (3, 4):
        other = datasets.with_validation(whole, 200, seed=seed).validation
        assert (other.image == made.validation.image).all() == (seed == 3)
    for images in (9, len(whole.train)):
        with pytest.raises(ConfigError, match="validation"):
            datasets.with_validation(whole, images, seed=0)


def test_some_classes_alone_with_the_labels_of_all():
    whole = datasets.load("digits")
    made = datasets.of_classes(whole, (2, 7))
    for split, of in ((made.train, whole.train), (made.test, whole.test)):
        rows = (of.label == 2) | (of.label == 7)
        np.testing.assert_array_equal(split.image, of.image[rows])
        assert {*split.label.tolist()} == {2, 7}
    assert made.classes == whole.classes
    with pytest.raises(ConfigError, match=r"data.classes = \(10,\)"):
        datasets.of_classes(whole, (2, 10))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with validation images, and what its function was called with."""
    folder, calls = tmp_path_factory.mktemp("run"), []
    hook, data = (lambda *call: calls.append(call)), build.dataset(config())
    return folder, train_and_evaluate(config(), folder, data, on_metrics=hook), calls


def test_the_test_images_are_evaluated_once_at_the_end(run):
    folder, summary, _ = run
    judged = lines(folder, "validation")
    assert [(line["step"], line["count"]) for line in judged] == [(2, 100), (4, 100), (6, 100)]
    assert [line["step"] for line in lines(folder, "test")] == [6]
    best = max(line["accuracy"] for line in judged)
    assert summary["best_validation"]["accuracy"] == best
    assert (summary["chosen_by"], "best_test" in summary) == ("validation images", False)
    records = map(
        json.loads, (path.read_text() for path in folder.glob("checkpoints/*/bnjax.json"))
    )
    assert max(record["accuracy"] for record in records) == best


def test_a_report_says_which_images_chose(run):
    study = runs.read_study([run[0]])
    table = report.results(study)
    assert "best validation accuracy" in table.columns
    assert "of a run on the validation images" in table.caption
    accuracies = [line["accuracy"] for line in lines(run[0], "validation")]
    (made,) = study.runs
    assert runs.value(made, "validation_accuracy", "best") == max(accuracies)
    np.testing.assert_array_equal(made.curve("judged").accuracy, accuracies)


def test_the_function_is_called_with_every_line(run):
    folder, _, calls = run
    written = read_lines(folder / "metrics.jsonl")
    assert [call[:2] for call in calls] == [(line["step"], line["split"]) for line in written]
    for (_, _, values), line in zip(calls, written, strict=True):
        assert values["loss"] == line["loss"]
        assert not any(isinstance(value, dict) for value in values.values())
    gap = next(values for _, split, values in calls if split == "gap")
    assert set(gap) >= {"batch_loss", "drift_mean/dense0_norm", "drift_variance/dense0_norm"}


@pytest.mark.parametrize("at", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_an_error_of_the_function_ends_the_run_with_everything_saved(run, tmp_path, at):
    def fails(step, split, values):
        if step == at:
            raise LookupError("no network")

    made, data = config(), build.dataset(config())
    with pytest.raises(LookupError, match="no network"):
        train_and_evaluate(made, tmp_path, data, on_metrics=fails)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*"))
    assert saved >= at
    assert [line["step"] for line in lines(tmp_path, "train")] == [*range(1, saved + 1)]
    train_and_evaluate(made, tmp_path, data)
    assert_same_metrics(tmp_path, run[0])


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    made = synthetic.config(steps=60)
    made.train.patience, made.eval.every_steps = 3, 2
    summary = synthetic.train(made, tmp_path)
    found = [line["accuracy"] for line in lines(tmp_path, "test")]
    best = found.index(max(found))
    assert len(found) == best + 1 + 3
    assert summary["steps"] == 2 * len(found) < 60
    assert summary["ended"] == "3 evaluations without a better accuracy"
    assert synthetic.train(made, tmp_path)["steps"] == summary["steps"]
