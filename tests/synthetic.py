"""A data set that a small network learns in a few steps, and a config for it."""

import dataclasses
import functools
import itertools
import json
import signal

import numpy as np

from bnjax.data.datasets import Dataset, Split
from bnjax.errors import NonFiniteError
from bnjax.train import build, parsing
from bnjax.train.config import default_config
from bnjax.train.dispatch import default_feed
from bnjax.train.loop import Trainer
from bnjax.train.run import StopRequest


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


def _same(step, item, seed):
    return item


@functools.cache
def _trainer(config):
    """A trainer of the config, and what becomes of each item that it is fed: replaced at will."""
    config = parsing.from_dict(json.loads(config))
    usual = default_feed(build.experiment(config, dataset()), dataset().train)
    hook = {"each": _same, "first": None}

    def items(seed, start):
        numbered = enumerate(usual.items(seed, start), start + 1)
        for step, item in itertools.islice(numbered, hook["first"]):
            yield hook["each"](step, item, seed)

    return Trainer(config, dataset(), dataclasses.replace(usual, items=items)), hook


def trainer(config, _=None, *, each=_same, first=None):
    """A trainer on this data; those of one config share what is compiled.

    `each` sees and returns every item, and after `first` of them there are no more.
    """
    shared = config.copy_and_resolve_references()
    shared.seed = 0
    found, hook = _trainer(shared.to_json())
    hook |= {"each": each, "first": first}
    return found


def train_seeds(config, folders, **options):
    """`Trainer.train` on this data."""
    with StopRequest() as stop:
        return trainer(config, **options).train(folders, stop)


def train(config, workdir, **options):
    """`train_and_evaluate` on this data."""
    (result,) = train_seeds(config, {config.seed: workdir}, **options).values()
    if isinstance(result, NonFiniteError):
        raise result
    return result


def interrupting(at):
    """As if the user had pressed Ctrl-C while the batch of a step is made."""

    def each(step, item, seed):
        if step == at:
            signal.raise_signal(signal.SIGINT)
        return item

    return each


def bad_in(*steps, of=0):
    """Gives steps of a seed labels of no class, so that the losses are not finite."""

    def each(step, item, seed):
        bad = step in steps and seed == of
        return item | {"label": np.full_like(item["label"], 99)} if bad else item

    return each


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
