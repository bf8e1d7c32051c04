"""A data set that a small network learns in a few steps, and a config for it."""

import dataclasses
import functools
import itertools
import json
import signal

import jax
import numpy as np

from bnjax.data.datasets import Dataset, Split
from bnjax.errors import NonFiniteError
from bnjax.train import build, parsing
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.config import default_config
from bnjax.train.dispatch import default_feed
from bnjax.train.interrupt import StopRequest
from bnjax.train.jsonl import read_lines
from bnjax.train.loop import Trainer
from bnjax.train.steps import unstack
from bnjax.train_step import init_state


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

    classes = ("top", "middle", "bottom")
    return Dataset("synthetic", "synthetic", None, split(train), split(test), classes)


@functools.cache
def _trainer(config):
    """A trainer of the config, and the options of `trainer`, which may change."""
    config, options = parsing.from_dict(json.loads(config)), {}
    usual = default_feed(build.experiment(config, dataset()), dataset().train)

    def items(seed, start):
        numbered = enumerate(usual.items(seed, start), start + 1)
        for step, item in itertools.islice(numbered, options["first"]):
            yield options["each"](step, item, seed)

    return Trainer(config, dataset(), dataclasses.replace(usual, items=items)), options


def trainer(config, _=None, *, each=lambda step, item, seed: item, first=None):
    """A trainer on this data; those of one config share what is compiled.

    `each` sees and returns every item, and after `first` of them there are no more.
    """
    shared = config.copy_and_resolve_references()
    shared.seed = 0
    found, options = _trainer(shared.to_json())
    options |= {"each": each, "first": first}
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


def lines(workdir, split):
    """The lines of metrics.jsonl of a split."""
    return [line for line in read_lines(workdir / "metrics.jsonl") if line["split"] == split]


def assert_same_metrics(workdir, *others):
    """The files of metrics of some runs are equal to the bit."""
    first, *rest = ((folder / "metrics.jsonl").read_bytes() for folder in (workdir, *others))
    assert rest == [first] * len(others)


def restored(workdir, config, step="last"):
    """The state and the statistics with which training goes on; the key as numbers."""
    made = build.experiment(config, dataset())
    init = functools.partial(init_state, made.model, made.tx)
    like = jax.eval_shape(init, jax.random.key(0), dataset().train.image[:1])
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        found = checkpoints.restore(checkpoints.step(str(step)), like)
    return found[0].replace(rng=jax.random.key_data(found[0].rng)), found[1]


def take(steps, items, counts, seeds=1):
    """Takes so many steps in each dispatch of compiled `Steps`.

    Returns the states and statistics of all seeds, and the metrics of each step and seed.
    """
    *states, bad_steps = steps.join([steps.init(seed) for seed in range(seeds)], [0] * seeds)
    metrics, items = [], iter(items)
    for count in counts:
        dispatch = [*itertools.islice(items, count)]
        *states, bad_steps, new = steps.train(*states, bad_steps, dispatch)
        metrics += unstack(new, count, seeds)
    return states, metrics


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
    config.name, config.devices, config.data.name = "small", 1, "synthetic"
    config.model.update(filters=(4,), kernels=(3,), strides=(2,))
    config.model.update(dense=(8,), dropout=(0.3,), norm_dense=(True,))
    config.train.update(steps=steps, epochs=0.0, batch_size=10, shuffle=True)
    config.eval.update(every_steps=5, every_epochs=0.0, batch_size=8)
    config.eval.update(histograms=0, pictures=0, gap_images=0)  # each costs a compilation
    config.optimizer.learning_rate = 0.01
    return config
