"""Training on many devices gives what one device gives, and norms see what the config says."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import synthetic
from wrappers import close

from bnjax.data.feed import host_feed, resident_feed
from bnjax.errors import ConfigError
from bnjax.train import build
from bnjax.train.devices import spread
from bnjax.train.interrupt import Stopped
from bnjax.train.jsonl import read_lines
from bnjax.train.steps import Steps

DATA = synthetic.dataset()
BATCH = 24


def config(norm="batch", virtual_batch=BATCH, micro_batches=1):
    """SGD shows a gradient that is n times too large, where Adam would hide it.

    A sigmoid has no kink, at which a rounding would become a large difference.
    """
    config = synthetic.config()
    config.train.update(batch_size=BATCH, micro_batches=micro_batches)
    config.model.update(dense=(), dropout=(), norm_dense=())  # quick to compile
    config.model.update(norm=norm, virtual_batch=virtual_batch, activation="sigmoid")
    config.optimizer.update(name="sgd", learning_rate=0.01, momentum=0.9)
    return config


def train(config, parallel, *, resident=False, seeds=1, steps=3):
    """Returns the parameters, the optimizer's state and the statistics of each seed, and metrics.

    The metrics are those of an evaluation after so many steps.
    """
    experiment = build.experiment(config, DATA)
    model = build.network(config.model, 3, (8, 8, 1), **parallel.norm_axes)
    experiment = dataclasses.replace(experiment, parallel=parallel, training_model=model)
    make = functools.partial(resident_feed, max_steps=steps) if resident else host_feed
    feed = make(DATA.train, BATCH, shuffle=True, part=experiment.part)
    compiled = Steps(experiment, DATA, feed, seeds)
    items = zip(*(feed.items(seed, 0) for seed in range(seeds)), strict=True)
    counts = [feed.max_steps] * (steps // feed.max_steps)
    both, _ = synthetic.take(compiled, items, counts, seeds)
    found = [compiled.of_seed(tuple(both), seed) for seed in range(seeds)]
    trees = [tree for state, stats in found for tree in (state.params, state.opt_state, stats)]
    return jax.device_get((*trees, compiled.test(both[0].params, both[1])))


@functools.cache
def on_one_device(norm="batch", virtual_batch=BATCH, micro_batches=1, **options):
    small = config(norm, virtual_batch, micro_batches)
    return train(small, spread(jax.devices()[:1]), **options)


# Each compiles two networks over several devices.
SLOW = pytest.mark.slow


# 5 and 7 do not divide 24: the batch is filled up, with 7 so far that a device has padding only.
# Micro-batches: each device has parts of equal size.
@pytest.mark.parametrize(
    ("devices", "options", "micro_batches"),
    [
        (5, {}, 1),
        (3, {}, 3),
        pytest.param(3, {"resident": True}, 1, marks=SLOW),
        pytest.param(5, {"resident": True}, 3, marks=SLOW),
        pytest.param(7, {}, 1, marks=SLOW),
        pytest.param(4, {"seeds": 2}, 1, marks=SLOW),
    ],
)
def test_global_statistics_are_those_of_one_device(devices, options, micro_batches):
    small = config(micro_batches=micro_batches)
    found = train(small, spread(jax.devices()[:devices]), **options)
    wanted = on_one_device(micro_batches=micro_batches, seeds=options.get("seeds", 1))
    close(found, wanted)
    if micro_batches > 1:
        # Each is normalised by itself, so that the parameters are those of no whole batch.
        (params, _, stats, _), (usual, _, averages, _) = found, on_one_device()
        name = "conv0_norm"  # its input is the same in the first step, and alike afterwards
        np.testing.assert_allclose(stats[name]["var"], averages[name]["var"], rtol=0.2)
        assert not np.allclose(params["conv0"]["kernel"], usual["conv0"]["kernel"], 1e-3)


# Ghost batch norm on one device: virtual batches of as many examples, averages of the whole batch.
@pytest.mark.parametrize(
    ("devices", "over"),
    [
        (4, 2),
        pytest.param(4, "per_device", marks=SLOW),
        pytest.param(8, 2, marks=SLOW),
        pytest.param(8, 4, marks=SLOW),
    ],
)
def test_groups_are_ghost_batches_of_one_device(devices, over):
    parallel = spread(jax.devices()[:devices], over)
    together = 1 if over == "per_device" else over
    close(train(config(), parallel), on_one_device("ghost", BATCH // devices * together))


@pytest.mark.parametrize(
    ("first", "then"),
    [(2, 1), pytest.param(4, 2, marks=SLOW), pytest.param(1, 4, marks=SLOW)],
)
def test_a_run_goes_on_on_another_number_of_devices(tmp_path, capsys, first, then):
    """With dropout: under jit the units that are dropped depend on no device."""

    def on(devices, name, **options):
        small = synthetic.config(steps=8)
        small.devices = devices
        return synthetic.train(small, tmp_path / name, **options)

    with pytest.raises(Stopped):
        on(first, "moved", each=synthetic.interrupting(5))
    assert f"on {f'{first} x ' * (first > 1)}cpu" in capsys.readouterr().out
    on(then, "moved")
    on(1, "at_rest")
    moved, at_rest = (read_lines(tmp_path / of / "metrics.jsonl") for of in ("moved", "at_rest"))
    for mine, its in zip(moved, at_rest, strict=True):
        assert (mine["step"], mine["split"]) == (its["step"], its["split"])
        np.testing.assert_allclose(mine["loss"], its["loss"], rtol=1e-3)


def test_impossible_numbers_of_devices_are_config_errors():
    small = synthetic.config()
    few = (8, "per_device", "model.statistics_over")  # of 10 images one for each norm
    for devices, over, key in ((9, "global", "devices"), (8, "3", "model.statistics_over"), few):
        small.devices, small.model.statistics_over = devices, over
        with pytest.raises(ConfigError, match=key):
            build.experiment(small, DATA)
