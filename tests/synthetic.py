"""A data set that a small network learns in a few steps, and a config for it."""

import dataclasses
import itertools

import numpy as np

from bnjax.data.datasets import Dataset, Split
from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train.steps import default_feed


def dataset(train=48, test=20):
    """Images [n, 8, 8, 1] in three classes, each a bright row with noise.

    Neither size is a multiple of the batch.
    """
    rng = np.random.default_rng(0)

    def split(n):
        label = rng.integers(0, 3, n).astype(np.int32)
        image = rng.integers(0, 60, (n, 8, 8, 1), np.uint8)
        image[np.arange(n), label * 2] += 150
        return Split(image, label)

    return Dataset(
        "synthetic", "synthetic", None, split(train), split(test), ("top", "middle", "bottom")
    )


def feed(config, *, each=lambda step, item: item, first=None):
    """The default feed; `each` sees and returns every item, and after `first` there are no more."""
    usual = default_feed(build.experiment(config, dataset()), dataset().train)

    def items(seed, start):
        numbered = enumerate(usual.items(seed, start), start + 1)
        return (each(step, item) for step, item in itertools.islice(numbered, first))

    return dataclasses.replace(usual, items=items)


def config(steps=12):
    config = default_config()
    config.name, config.devices = "small", 1
    config.data.name = "synthetic"
    config.model.filters, config.model.kernels, config.model.strides = (4,), (3,), (2,)
    config.model.dense, config.model.dropout, config.model.norm_dense = (8,), (0.3,), (True,)
    config.train.steps, config.train.epochs, config.train.batch_size, config.train.shuffle = (
        steps,
        0.0,
        10,
        True,
    )
    config.eval.every_steps, config.eval.every_epochs, config.eval.batch_size = 5, 0.0, 8
    config.eval.histograms = config.eval.pictures = config.eval.gap_images = (
        0  # each costs a compilation
    )
    config.optimizer.learning_rate = 0.01
    return config
