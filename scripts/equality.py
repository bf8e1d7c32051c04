"""Prints the differences between training on several devices and training on one.

    python scripts/equality.py

For each number of simulated devices and each choice of devices that share batch statistics, trains
a network with sigmoids for five steps of SGD with momentum on the embedded digits. The table has
the largest difference from one device in parameters, running statistics and metrics (of training
and evaluation), relative to the largest value in the array. Where devices do not share batch
statistics, the reference is ghost batch norm on one device, whose virtual batches are the images of
each device or group. Rounding errors of float32 are 6e-8 and grow from step to step.

Time: one minute on two cores. The speed is meaningless, because simulated devices share the cores.
"""

import argparse
import dataclasses
import functools
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import numpy as np

from bnjax.data import datasets
from bnjax.data.feed import host_feed
from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train.devices import Parallel, spread
from bnjax.train.steps import Steps

STEPS = 5


def config_of(batch: int, micro_batches: int, virtual_batch: int | None):
    """Returns the config of a small network without dropout."""
    config = default_config()
    config.data.name = "digits"
    config.model.filters, config.model.kernels, config.model.strides = (8, 8), (3, 3), (2, 1)
    config.model.dense, config.model.dropout, config.model.norm_dense = (16,), (0.0,), (True,)
    # Smooth, because a rounding error that changes the sign of a ReLU's input causes a difference
    # of 1e-3.
    config.model.activation = "sigmoid"
    if virtual_batch is not None:
        config.model.norm, config.model.virtual_batch = "ghost", virtual_batch
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.02
    config.optimizer.momentum = 0.9
    config.train.batch_size, config.train.micro_batches = batch, micro_batches
    config.eval.histograms = config.eval.pictures = config.eval.gap_images = 0
    return config


def train(config, parallel: Parallel):
    """Returns parameters, statistics and metrics after five steps."""
    dataset = datasets.load("digits")
    experiment = build.experiment(config, dataset)
    shape = dataset.train.image_shape
    model = build.network(config.model, len(dataset.classes), shape, **parallel.norm_axes)
    experiment = dataclasses.replace(experiment, parallel=parallel, training_model=model)
    feed = host_feed(dataset.train, experiment.batch_size, shuffle=True, part=experiment.part)
    steps = Steps(experiment, dataset, feed)
    state, stats, bad_steps = steps.join([steps.init(0)], [0])
    items, metrics = feed.items(0, 0), []
    for _ in range(STEPS):
        state, stats, bad_steps, of_step = steps.train(state, stats, bad_steps, [(next(items),)])
        metrics.append(of_step)
    return jax.device_get((state.params, stats, (metrics, steps.test(state.params, stats))))


def difference(mine, its) -> float:
    """Returns the largest difference, relative to the largest value in the array."""
    pairs = zip(jax.tree.leaves(mine), jax.tree.leaves(its), strict=True)
    wide = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(np.abs(a - b).max() / (np.abs(b).max() or 1) for a, b in wide)


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=48, help="images of a step (48)")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a step (1)")
    given = parser.parse_args()

    @functools.cache
    def truth(virtual_batch):
        config = config_of(given.batch, given.micro_batches, virtual_batch)
        return train(config, spread(jax.devices()[:1]))

    print("| BN over | devices | parameters | statistics | metrics |", flush=True)
    print("|---|---|---|---|---|", flush=True)
    for over in ("global", "per_device", 2):
        for devices in (1, 2, 4, 8):
            if over != "global" and devices < (2 if over == "per_device" else over):
                continue
            together = devices if over == "global" else 1 if over == "per_device" else over
            name = f"groups of {over}" if isinstance(over, int) else over
            parallel = spread(jax.devices()[:devices], over)
            found = train(config_of(given.batch, given.micro_batches, None), parallel)
            size = given.batch // given.micro_batches // devices * together
            kinds = zip(found, truth(None if together == devices else size), strict=True)
            cells = [name, str(devices), *(f"{difference(*kind):.0e}" for kind in kinds)]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
