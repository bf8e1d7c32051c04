"""The table of config keys: name, default, what is allowed, what it is for.

A config file takes `default_config()`, the tutorial's network and training, changes what it is
about and returns it from `get_config`. Relations between keys are checked in `bnjax.train.checks`.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from bnjax.errors import ConfigError
from bnjax.train.allowed import (
    AMOUNT,
    DURATION,
    FLAG,
    FRACTION,
    IMAGES,
    MAX_PICTURES,
    POSITIVE,
    SAVES,
    SEED,
    TEXT,
    Check,
    Key,
    one_of,
    whole,
)
from bnjax.train.data_keys import AUGMENT_KEYS, DATA_KEYS
from bnjax.train.model_keys import MODEL_KEYS
from bnjax.train.optimizer_keys import OPTIMIZER_KEYS

KEYS = (
    Key("name", "", TEXT, "of the run; the file's name if empty"),
    Key("seed", 0, SEED, "of the initial weights, the order of the images and dropout"),
    Key("devices", 0, whole(0), "how many train together, 0: all; batches stay as large"),
    *DATA_KEYS,
    *AUGMENT_KEYS,
    *MODEL_KEYS,
    *OPTIMIZER_KEYS,
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
        "train.label_smoothing",
        0.0,
        FRACTION,
        "the part of each label that is spread over all classes; the training loss is with it",
    ),
    Key(
        "train.target_loss",
        0.2,
        POSITIVE,
        "the summary says when the training loss first was at or below it",
    ),
    Key(
        "train.stop_at_loss",
        0.0,
        Check("a number above 0, or 0 to take every step", AMOUNT.holds),
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
        "eval.views",
        1,
        Check("1, 2 or 6", lambda value: value in (1, 2, 6)),
        "the mean of how many views of each image is its logits: 2, with the mirror; 6, with both "
        "shifted by a pixel twice besides",
    ),
    Key(
        "eval.views_share",
        1.0,
        Check("above 0 up to 1", lambda value: 0 < value <= 1),
        "of the images of a batch that are looked at again, the least certain; the others once",
    ),
    Key(
        "eval.gap_images",
        256,
        IMAGES,
        "training images that are evaluated under the running averages and under statistics of "
        "their own at each evaluation: what the averages cost, and how far off each is",
    ),
    Key(
        "eval.histograms",
        256,
        IMAGES,
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
