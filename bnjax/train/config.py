"""The table of config keys: name, default, what is allowed, what it is for.

A config file takes `default_config()`, the tutorial's network and training, changes what it is
about and returns it from `get_config`. Relations between keys are checked in `bnjax.train.checks`.
"""

import math
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from bnjax.errors import ConfigError
from bnjax.train.allowed import (
    DTYPE,
    DURATION,
    FLAG,
    FRACTION,
    MAX_PICTURES,
    MAX_SIZE,
    POSITIVE,
    SAVES,
    SEED,
    SIZES,
    STEP,
    TEXT,
    Check,
    Key,
    each,
    one_of,
    whole,
)
from bnjax.train.data_keys import DATA_KEYS

KEYS = (
    Key("name", "", TEXT, "of the run; the file's name if empty"),
    Key("seed", 0, SEED, "of the initial weights, the order of the images and dropout"),
    Key("devices", 0, whole(0), "how many train together, 0: all; batches stay as large"),
    *DATA_KEYS,
    # The network.
    Key("model.filters", (30, 50, 60), SIZES, "of each convolution"),
    Key("model.kernels", (3, 3, 3), SIZES, "the sides of the convolutions' kernels"),
    Key("model.strides", (2, 1, 1), SIZES, "of the convolutions, or of the pooling after them"),
    Key(
        "model.pooling",
        "none",
        one_of("none", "max", "avg"),
        "none: strided convolutions; max, avg: pool by the stride instead",
    ),
    Key("model.dense", (3500, 700), SIZES, "the widths of the hidden dense layers"),
    Key(
        "model.dropout",
        (0.0, 0.0),
        each(
            "fractions from 0 up to but not including 1",
            lambda rate: isinstance(rate, int | float) and 0 <= rate < 1,
        ),
        "the fraction that is dropped after each hidden dense layer",
    ),
    Key(
        "model.norm",
        "batch",
        one_of("batch", "ghost", "renorm", "layer", "group", "instance", "rms", "frn", "none"),
        "which normalisation",
    ),
    Key(
        "model.norm_dense",
        (True, True),
        each("True or False for each hidden dense layer", FLAG.holds),
        "whether the output of each hidden dense layer is normalised",
    ),
    Key(
        "model.placement",
        "input",
        one_of("input", "before", "after"),
        "of the norms: at the input of each layer, or before or after its activation",
    ),
    Key(
        "model.momentum",
        0.75,
        Check(f"{FRACTION.words} (the fraction of the old average that is kept)", FRACTION.holds),
        "of the running averages: the fraction of the old average that a step keeps",
        "momentum",
    ),
    Key("model.debias", False, FLAG, "whether averages leave their starting values out", "debias"),
    Key(
        "model.variance",
        "biased",
        one_of("biased", "unbiased"),
        "what the average stores: the variance divided by n, or by n - 1",
        "variance",
    ),
    Key(
        "model.statistics_over",
        "global",
        Check(
            "global, per_device, or a number of devices",
            lambda value: value in ("global", "per_device") or (value.isdecimal() and value > "0"),
        ),
        "batch norms normalise over the batch of all devices, of each, or of so many together; "
        "running averages are always those of all",
    ),
    Key("model.virtual_batch", 50, whole(2), "ghost: images of a virtual batch", "virtual_batch"),
    Key("model.renorm_steps", 40_000, whole(2), "renorm: when its limits are open", "renorm_steps"),
    Key("model.groups", 10, whole(1), "group: how many groups of channels", "groups"),
    Key("model.epsilon", 1e-3, POSITIVE, "what is added to variances", "epsilon"),
    Key(
        "model.activation",
        "relu",
        one_of("relu", "sigmoid", "tanh"),
        "of each hidden layer; norm frn brings its own",
    ),
    Key("model.scale", True, FLAG, "whether norms learn a scale for each channel", "use_scale"),
    Key("model.shift", True, FLAG, "whether norms learn a shift for each channel", "use_bias"),
    Key("model.weight_standardization", False, FLAG, "of the convolutions' kernels"),
    Key(
        "model.dtype",
        "float32",
        DTYPE,
        "of the arithmetic; parameters, statistics and metrics are float32, while gradients of "
        "kernels are of this dtype until they have been summed over devices",
    ),
    Key(
        "model.dense_product",
        "float32",
        DTYPE,
        "what the dense layers multiply; bfloat16 is for CPUs that are faster at it",
    ),
    # The optimizer.
    Key("optimizer.name", "adam", one_of("adam", "sgd"), "which optimizer"),
    Key("optimizer.learning_rate", 1e-3, POSITIVE, "constant over the run"),
    Key("optimizer.b1", 0.9, FRACTION, "adam: the decay of the mean gradient"),
    Key("optimizer.b2", 0.999, FRACTION, "adam: the decay of the mean squared gradient"),
    Key("optimizer.eps", 1e-8, POSITIVE, "adam: what is added to the root of the latter"),
    Key("optimizer.momentum", 0.0, FRACTION, "sgd: the fraction of the last update that is kept"),
    Key(
        "optimizer.average",
        "none",
        one_of("none", "ema", "swa"),
        "the mean of which weights is evaluated and predicted with, always under precise "
        "statistics of its own (eval.precise_images); training goes on without it",
    ),
    Key("optimizer.average_decay", 0.99, FRACTION, "ema: the fraction that a step keeps"),
    Key("optimizer.average_start", 1, STEP, "the first step whose weights are averaged"),
    Key("optimizer.average_every", 1, STEP, "from there on, how many steps lie between two"),
    # Training. A duration is given in steps or in epochs: exactly one of the two is not 0.
    Key("train.steps", 100, DURATION, "how long to train"),
    Key("train.epochs", 0.0, DURATION, "how long to train"),
    Key("train.batch_size", 5000, whole(1), "images of a step"),
    Key(
        "train.micro_batches",
        1,
        whole(1),
        "how many parts of a batch are gone through one after another, for want of memory; batch "
        "norms normalise each by itself",
    ),
    Key("train.shuffle", False, FLAG, "False: the order of the files, as in the tutorial"),
    Key(
        "train.target_loss",
        0.2,
        POSITIVE,
        "the summary says when the training loss first was at or below it",
    ),
    Key(
        "train.stop_at_loss",
        0.0,
        Check("a number above 0, or 0 to take every step", lambda value: 0 <= value < math.inf),
        "end training when the loss of a step first is at or below it; 0: take every step",
    ),
    Key(
        "train.on_nonfinite",
        "stop",
        one_of("stop", "skip"),
        "what to do with a step whose loss or gradient is not finite",
    ),
    Key("train.most_skipped", 10, whole(0), "skip: stop after more than so many in a row"),
    # Evaluation, each time followed by a checkpoint.
    Key("eval.every_steps", 0, DURATION, "how often to evaluate"),
    Key("eval.every_epochs", 2.0, DURATION, "how often to evaluate"),
    Key("eval.batch_size", 1000, whole(1), "images that are evaluated at once"),
    Key(
        "eval.statistics",
        "running",
        one_of("running", "precise"),
        "what evaluation normalises by: training's running averages, or the mean and variance of "
        "training images, taken anew each time. A checkpoint holds what was evaluated, for "
        "predict, and beside it what training goes on with",
    ),
    Key(
        "eval.precise_images",
        10_000,
        whole(2),
        "precise: of how many training images, at equal distances in the order of the data, in "
        "batches of about train.batch_size that are normalised one by one",
    ),
    Key(
        "eval.gap_images",
        256,
        whole(0, MAX_SIZE, f"a whole number up to {MAX_SIZE:,}, or 0 for none"),
        "training images that are evaluated under the running averages and under statistics of "
        "their own at each evaluation: what the averages cost, and how far off each is",
    ),
    Key(
        "eval.histograms",
        256,
        whole(0, MAX_SIZE, f"a whole number up to {MAX_SIZE:,}, or 0 for none"),
        "training images whose activations and gradients are summed up at each evaluation",
    ),
    Key(
        "eval.pictures",
        12,
        whole(0, MAX_PICTURES, f"a whole number from 0 up to {MAX_PICTURES}"),
        "test images that TensorBoard shows with their predictions at each evaluation",
    ),
    # Further checkpoints between the evaluations; at most one of the three is not 0.
    Key("checkpoint.every_steps", 0, SAVES, "how often to save"),
    Key("checkpoint.every_epochs", 0.0, SAVES, "how often to save"),
    Key("checkpoint.every_minutes", 0.0, SAVES, "how often to save"),
)


def default_config() -> ConfigDict:
    """Returns the defaults; every key that exists is there."""
    values: dict[str, Any] = {}
    for key in KEYS:
        section, _, name = key.name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = key.default
    return ConfigDict(values)


get_config = default_config  # this file is a config file too: the defaults as they are


def check_values(config: ConfigDict, section: str = "") -> None:
    """Checks each value by itself.

    Args:
        config: a whole config, or one section of it.
        section: its name, if it is one.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    for key, value in _values(config, section):
        if not key.allowed.holds(value):
            raise ConfigError(key.name, value, key.allowed.words)


def norm_options(model: ConfigDict) -> dict[str, Any]:
    """Returns the values in the section `model` that set fields of the norms, by their fields."""
    return {key.norm: value for key, value in _values(model, "model") if key.norm}


def _values(config: ConfigDict, section: str) -> Iterator[tuple[Key, Any]]:
    prefix = f"{section}." if section else ""
    for key in KEYS:
        if key.name.startswith(prefix):
            value = config
            for name in key.name.removeprefix(prefix).split("."):
                value = value[name]
            yield key, value
