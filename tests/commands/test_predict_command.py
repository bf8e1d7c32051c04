"""Predictions over the data that a run was trained on."""

from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic

from bnjax.commands.predict import of_split
from bnjax.data import datasets
from bnjax.train.loop import train_and_evaluate
from bnjax.train.rundir import DataFacts
from bnjax.train.trained import Trained


class Rows(nn.Module):
    """Its logits are the mean brightness of three rows; it tells how long each batch is."""

    tell: Callable[[int], None]

    def __call__(self, x, train):
        jax.debug.callback(self.tell, len(x))
        return jnp.stack([x[:, 2 * label].mean((1, 2)) for label in range(3)], axis=-1)


class InMemory(Trained):
    """A network that needs no run; its data are evaluated in batches of 8."""

    def __init__(self, model, data):
        self.workdir, self.step, self.model = Path("nowhere"), 7, model
        self.config, self.data, self._dataset = synthetic.config(), DataFacts.of(data), data
        self.params = self.batch_stats = {}

    def dataset(self, data_dir):
        return self._dataset


@pytest.mark.parametrize(("split", "images", "batches"), [("train", 48, 6), ("test", 20, 3)])
def test_the_images_of_a_split_go_through_the_network_once(split, images, batches):
    passes, data = [], synthetic.dataset(train=48, test=20)  # 4 of the third batch are padding
    trained = InMemory(Rows(passes.append), data)
    found = of_split(trained, split)
    jax.effects_barrier()
    assert [*map(int, passes)] == [8] * batches
    chosen = getattr(data, split)
    logits = chosen.image[:, :5:2].astype(np.float64).mean((2, 3)) / 255
    score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = score[np.arange(images), chosen.label]
    assert [row["class"] for row in found["predictions"]] == [
        data.classes[label] for label in logits.argmax(-1)
    ]
    np.testing.assert_allclose(
        [row["score"] for row in found["predictions"]], score.max(-1), rtol=1e-5
    )
    assert (found["count"], found["step"]) == (images, 7)
    np.testing.assert_allclose(found["loss"], -np.log(right).mean(), rtol=1e-5)
    assert found["accuracy"] == (logits.argmax(-1) == chosen.label).mean() == 1


@pytest.mark.parametrize("by_flag", [True, False])
def test_logits_are_averaged_over_views_where_the_run_or_the_flag_says_so(by_flag):
    data = synthetic.dataset(test=20)
    trained = InMemory(Rows(lambda n: None), data)
    trained.config.eval.views = 1 if by_flag else 6
    found = of_split(trained, "test", 6 if by_flag else None)
    image = data.test.image.astype(np.float64) / 255
    wide = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    views = [(image, 0.5), (wide[:, :-2, :-2], 0.25), (wide[:, 2:, 2:], 0.25)]  # mirrors are alike
    logits = sum(weight * one[:, :5:2].mean((2, 3)) for one, weight in views)
    score = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).max(-1)
    np.testing.assert_allclose([row["score"] for row in found["predictions"]], score, rtol=1e-5)
    assert found["views"] == 6
    assert of_split(trained, "test", 1)["loss"] != found["loss"]


def test_a_run_on_data_that_stood_in_is_predicted_on_those(tmp_path):
    """The set that was asked for may be there by now; here it is damaged, so that reading fails."""
    config = synthetic.config(steps=1)
    config.data.name, config.data.label, config.data.fallback = "cifar10", "mine", "digits"
    config.data.dir, config.data.train_images = str(tmp_path), 100
    summary = train_and_evaluate(config, tmp_path / "run", datasets.load("digits"))
    for place in (tmp_path, datasets.cache_dir()):
        (place / "cifar-10-binary.tar.gz").write_text("damaged")
    found = of_split(Trained(tmp_path / "run", "last"), "test")
    assert (found["dataset"], found["count"]) == ("digits", 359)
    assert found["accuracy"] == summary["final_test"]["accuracy"]
