"""Images set aside for validation, patience, and the function that is called with the metrics."""

import json

import numpy as np
import pytest
import synthetic

from bnjax.compare import report, runs
from bnjax.data import datasets
from bnjax.errors import ConfigError
from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train.loop import train_and_evaluate


def config(**train):
    made = default_config()
    made.name, made.devices, made.data.name = "digits", 1, "digits"
    made.data.validation = 100
    made.model.filters, made.model.kernels, made.model.strides = (4,), (3,), (4,)
    made.model.dense, made.model.dropout, made.model.norm_dense = (8,), (0.0,), (True,)
    made.train.steps, made.train.batch_size, made.train.shuffle = 6, 64, True
    made.eval.every_steps, made.eval.every_epochs = 2, 0.0
    made.eval.histograms = made.eval.pictures = 0
    made.eval.gap_images = 16
    made.train.update(train)
    return made


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_classes_are_set_aside_in_proportion_and_nothing_is_lost():
    whole = datasets.load("digits")
    made = datasets.with_validation(whole, 200, seed=3)
    aside, kept = np.bincount(made.validation.label), np.bincount(made.train.label)
    shares = aside / np.bincount(whole.train.label)
    assert np.abs(shares - 200 / len(whole.train)).max() < 1 / kept.min()
    together = np.concatenate([made.train.image, made.validation.image]).reshape(-1, 32 * 32 * 3)
    assert sorted(map(bytes, together)) == sorted(map(bytes, whole.train.image.reshape(-1, 3072)))
    other = datasets.with_validation(whole, 200, seed=4).validation
    assert (other.image != made.validation.image).any()
    again = datasets.with_validation(whole, 200, seed=3).validation
    np.testing.assert_array_equal(again.image, made.validation.image)
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
    made = config()
    summary = train_and_evaluate(
        made, folder, build.dataset(made), on_metrics=lambda *call: calls.append(call)
    )
    return folder, summary, calls


def test_the_test_images_are_evaluated_once_at_the_end(run):
    folder, summary, _ = run
    splits = [(line["split"], line["step"]) for line in lines_of(folder)]
    assert [step for split, step in splits if split == "validation"] == [2, 4, 6]
    assert [step for split, step in splits if split == "test"] == [6]
    judged = [line for line in lines_of(folder) if line["split"] == "validation"]
    assert {line["count"] for line in judged} == {100}
    best = max(line["accuracy"] for line in judged)
    assert summary["best_validation"]["accuracy"] == best
    assert summary["chosen_by"] == "validation images"
    assert "best_test" not in summary
    records = {
        int(path.parent.name): json.loads(path.read_text())["accuracy"]
        for path in folder.glob("checkpoints/*/bnjax.json")
    }
    assert max(records.values()) == best


def test_a_report_says_which_images_chose(run):
    study = runs.read_study([run[0]])
    table = report.results(study)
    assert "best validation accuracy" in table.columns
    assert "of a run, on the validation images" in table.caption
    accuracies = [line["accuracy"] for line in lines_of(run[0]) if line["split"] == "validation"]
    (made,) = study.runs
    assert runs.value(made, "validation_accuracy", "best") == max(accuracies)
    np.testing.assert_array_equal(made.judged.accuracy, accuracies)


def test_the_function_is_called_with_every_line(run):
    folder, _, calls = run
    lines = lines_of(folder)
    assert [call[:2] for call in calls] == [(line["step"], line["split"]) for line in lines]
    for (_, _, values), line in zip(calls, lines, strict=True):
        assert values["loss"] == line["loss"]
        assert not any(isinstance(value, dict) for value in values.values())
    gap = next(values for _, split, values in calls if split == "gap")
    assert set(gap) >= {"batch_loss", "drift_mean/dense0_norm", "drift_variance/dense0_norm"}


@pytest.mark.parametrize("at", [3, pytest.param(6, marks=pytest.mark.slow)])
def test_an_error_of_the_function_ends_the_run_with_everything_saved(tmp_path, at):
    def fails(step, split, values):
        if step == at:
            raise LookupError("no network")

    made, data = config(), None
    data = build.dataset(made)
    with pytest.raises(LookupError, match="no network"):
        train_and_evaluate(made, tmp_path / "run", data, on_metrics=fails)
    saved = max(int(path.name) for path in (tmp_path / "run/checkpoints").glob("[0-9]*"))
    assert saved >= at
    assert [line["step"] for line in lines_of(tmp_path / "run") if line["split"] == "train"] == [
        *range(1, saved + 1)
    ]
    resumed = train_and_evaluate(made, tmp_path / "run", data)
    whole = train_and_evaluate(made, tmp_path / "whole", data)
    assert resumed["final_test"] == whole["final_test"]
    assert lines_of(tmp_path / "run") == lines_of(tmp_path / "whole")


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    made = synthetic.config(steps=60)
    made.train.patience, made.eval.every_steps = 3, 2
    summary = synthetic.train(made, tmp_path)
    found = [line["accuracy"] for line in lines_of(tmp_path) if line["split"] == "test"]
    best = found.index(max(found))
    assert len(found) == best + 1 + 3
    assert summary["steps"] == 2 * len(found) < 60
    assert summary["ended"] == "3 evaluations without a better accuracy"
    assert synthetic.train(made, tmp_path)["steps"] == summary["steps"]
