"""Predictions over the data that a run was trained on."""

import synthetic

from bnjax.data import datasets
from bnjax.train.loop import train_and_evaluate
from bnjax.train.predict import of_split


def test_a_run_on_data_that_stood_in_is_predicted_on_those(tmp_path, monkeypatch):
    """The set that was asked for may be there by now, under the user's own label and elsewhere."""
    config = synthetic.config(steps=1)
    config.data.name, config.data.label, config.data.fallback = "cifar10", "mine", "digits"
    config.data.dir, config.data.train_images = str(tmp_path), 100
    summary = train_and_evaluate(config, tmp_path / "run", datasets.load("digits"))
    monkeypatch.setattr(datasets, "_cifar", lambda *_: synthetic.dataset())
    found = of_split(tmp_path / "run", "last", "test", None)
    assert (found["dataset"], found["count"]) == ("digits", 359)
    assert found["accuracy"] == summary["final_test"]["accuracy"]
