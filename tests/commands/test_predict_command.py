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


@pytest.mark.parametrize(
    ("split", "views", "by_flag"),
    [("train", 1, False), ("test", 1, True), ("test", 6, False), ("test", 6, True)],
)
def test_each_image_of_a_split_goes_through_the_network_once_in_each_view(split, views, by_flag):
    sizes, data = [], synthetic.dataset(train=48, test=20)  # 4 of the third batch are padding
    trained = InMemory(Rows(sizes.append), data)
    if by_flag:  # instead of what the config says
        trained.config.eval.update(views=7 - views, views_share=0.25)
    else:
        trained.config.eval.views = views
    found = of_split(trained, split, views if by_flag else None)
    jax.effects_barrier()
    chosen = getattr(data, split)
    if views == 1:
        assert [*map(int, sizes)] == [8] * -(-len(chosen) // 8)
    image = chosen.image.astype(np.float64) / 255
    wide = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = ((wide[:, :-2, :-2], 0.25), (wide[:, 2:, 2:], 0.25))  # mirrors are alike
    parts = ((image, 0.5), *shifted) if views == 6 else ((image, 1.0),)
    logits = sum(weight * one[:, :5:2].mean((2, 3)) for one, weight in parts)
    score = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows = found["predictions"]
    assert [row["class"] for row in rows] == [data.classes[i] for i in logits.argmax(-1)]
    np.testing.assert_allclose([row["score"] for row in rows], score.max(-1), rtol=1e-5)
    assert (found["count"], found["step"], found["views"]) == (len(chosen), 7, views)
    right = score[np.arange(len(chosen)), chosen.label]
    np.testing.assert_allclose(found["loss"], -np.log(right).mean(), rtol=1e-5)
    assert found["accuracy"] == (logits.argmax(-1) == chosen.label).mean()


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
