"""The config: every key with its default, the allowed values and its purpose."""

import math
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from bnjax.errors import ConfigError

MAX_SIZE = 1 << 20  # of a layer: beyond it is a slip of the finger
MAX_SIDE = 1 << 14  # of an image
MAX_WORKERS = 1024
MAX_PICTURES = 100  # that are still looked at


class Check(NamedTuple):
    """The allowed values of a key, in words and as a function of a value of the key's type."""

    words: str
    holds: Callable[[Any], bool]


class Key(NamedTuple):
    """One key of the config.

    Attributes:
        name: with its section and a dot before it, if it is in one.
        default: its type is that of every value.
        allowed: the check of a value by itself.
        help: the purpose.
        needs: another key, and those of its values with which this one exists; elsewhere it has to
            keep its default.
        norm: the field of the classes in `bnjax.norms` that it sets, if it sets one.
        was: an earlier name.
    """

    name: str
    default: Any
    allowed: Check
    help: str
    needs: tuple[str, tuple[str, ...]] | None = None
    norm: str = ""
    was: str = ""


def one_of(*values: str) -> Check:
    """Allows some texts."""
    return Check(", ".join(values), lambda value: value in values)


def whole(low: int, high: float = math.inf, words: str = "") -> Check:
    """Allows whole numbers from `low` to `high`."""
    return Check(words or f"a whole number, {low} or above", lambda value: low <= value <= high)


def each(words: str, holds: Callable[[Any], bool]) -> Check:
    """Allows tuples of which each value is allowed."""
    return Check(words, lambda values: all(map(holds, values)))


def is_whole(value: Any, low: int) -> bool:
    """Returns whether a value inside a tuple is a whole number, `low` or above."""
    return type(value) is int and low <= value <= MAX_SIZE


TEXT = Check("any text", lambda value: True)
FLAG = Check("True or False", lambda value: True)
POSITIVE = Check("a number above 0", lambda value: 0 < value < math.inf)
AMOUNT = Check("a number, 0 or above", lambda value: 0 <= value < math.inf)
FRACTION = Check("0 up to but not including 1", lambda value: 0 <= value < 1)
SHARE = Check("above 0 up to 1", lambda value: 0 < value <= 1)
# Steps are counted in int32.
DURATION = Check(
    "a number above 0 and below 2**31, or 0 to use the other unit",
    lambda value: 0 <= value < 1 << 31,
)
SAVES = Check("a number above 0 and below 2**31, or 0 for none", DURATION.holds)
STEP = whole(1, 2**31 - 1, "a whole number above 0 and below 2**31")
SEED = whole(0, 2**32 - 1, "a whole number from 0 up to 2**32 - 1")
IMAGES = whole(0, MAX_SIZE, f"a whole number up to {MAX_SIZE:,}, or 0 for none")
PIXELS = whole(0, MAX_SIDE, f"a whole number of pixels up to {MAX_SIDE:,}, or 0")
SIZES = each(f"whole numbers above 0, up to {MAX_SIZE:,}", lambda size: is_whole(size, 1))
RATES = each(
    f"fractions, {FRACTION.words}",
    lambda rate: isinstance(rate, int | float) and FRACTION.holds(rate),
)
DTYPE = one_of("float32", "bfloat16")
OVER = Check(
    "global, per_device, or a number of devices",
    lambda value: value in ("global", "per_device") or (value.isdecimal() and value > "0"),
)
# Durations in several units: a command line that sets one of them sets the others to 0.
UNITS = (
    ("train.steps", "train.epochs"),
    ("eval.every_steps", "eval.every_epochs"),
    ("checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.every_minutes"),
)

STREAM = ("data.pipeline", ("stream",))
NETWORKS = ("convnet", "speednet", "resnet18", "resnet20", "resnet50")
CONVNET, SPEEDNET = ("model.name", ("convnet",)), ("model.name", ("speednet",))
WITH_FILTERS = ("model.name", ("convnet", "speednet"))
NOT_CONVNET = ("model.name", NETWORKS[1:])
NOT_SPEEDNET = ("model.name", tuple(name for name in NETWORKS if name != "speednet"))

KEYS = (
    Key("name", "", TEXT, "of the run; the file's name if empty"),
    Key("seed", 0, SEED, "of the initial weights, the order of the images and dropout"),
    Key("devices", 0, whole(0), "how many train together, 0: all; batches stay as large"),
    Key(
        "data.name",
        "cifar10",
        Check("cifar10, cifar100, digits, records, or the name of a TFDS set", bool),
        "cifar10, cifar100, digits, or a data set of TensorFlow Datasets; records: array_record "
        "files in data.dir",
    ),
    Key(
        "data.dir",
        "",
        TEXT,
        "a folder with cifar-10-batches-bin or cifar-10-binary.tar.gz or array_record files, or a "
        "TFDS data_dir",
    ),
    Key(
        "data.fallback",
        "",
        Check("'digits', or '' for none", lambda value: value in ("", "digits")),
        "digits: use these real images where the named ones cannot be had; empty: fail",
    ),
    Key("data.label", "", TEXT, "the name of the data in summaries and tables; if empty, its own"),
    Key(
        "data.train_images",
        0,
        whole(0, words="a whole number above 0, or 0 for all"),
        "train on the first so many only; 0: on all",
    ),
    Key(
        "data.pipeline",
        "memory",
        one_of("memory", "stream"),
        "memory: all images are loaded; stream: array_record files are read while training",
    ),
    Key("data.image_size", 0, PIXELS, "the side of the square crop; 0: no crop", STREAM),
    Key(
        "data.shorter_side",
        0,
        PIXELS,
        "the shorter side is first resized to so much; 0: to image_size",
        STREAM,
    ),
    Key("data.random_crop", False, FLAG, "crops of training at random, not in the middle", STREAM),
    Key(
        "data.workers",
        0,
        whole(0, MAX_WORKERS, f"a whole number up to {MAX_WORKERS:,}"),
        "processes that read ahead; 0: threads instead; results do not depend on it",
        STREAM,
    ),
    # In the order in which training images are augmented, on the device.
    Key(
        "augment.flip",
        "none",
        one_of("none", "random", "alternating"),
        "mirror images: each time by chance, or a random half and then all every other epoch",
    ),
    Key("augment.translate", 0, PIXELS, "shift by up to so much; edges are reflected"),
    Key("augment.crop", 0, PIXELS, "shift by up to so much; the new border is black"),
    Key("augment.brightness", 0.0, AMOUNT, "add up to so much, either way; white is 1"),
    Key("augment.contrast", 0.0, AMOUNT, "stretch about the mean by up to so much, either way"),
    Key("augment.cutout", 0, PIXELS, "blank a square with sides of so much"),
    Key("augment.mixup", 0.0, AMOUNT, "mix two images, by shares from Beta(so much, so much)"),
    Key("model.name", "convnet", one_of(*NETWORKS), "the network; convnet: the tutorial's"),
    Key(
        "model.mean",
        (),
        each("numbers", math.isfinite),
        "subtracted from the pixels of each channel first; white is 1; empty: nothing",
        NOT_CONVNET,
    ),
    Key(
        "model.std",
        (),
        each("numbers above 0", POSITIVE.holds),
        "the divisor of the pixels of each channel; empty: none",
        NOT_CONVNET,
    ),
    Key(
        "model.filters",
        (30, 50, 60),
        SIZES,
        "of each convolution; speednet: of each group of two",
        WITH_FILTERS,
    ),
    Key(
        "model.whiten_images",
        5000,
        whole(1),
        "training images whose 2x2 patches the first convolution whitens",
        SPEEDNET,
    ),
    Key("model.kernels", (3, 3, 3), SIZES, "the sides of the convolutions' kernels", CONVNET),
    Key(
        "model.strides",
        (2, 1, 1),
        SIZES,
        "of the convolutions, or of the pooling after them",
        CONVNET,
    ),
    Key(
        "model.pooling",
        "none",
        one_of("none", "max", "avg"),
        "none: strided convolutions; max, avg: pool by the stride instead",
        CONVNET,
    ),
    Key("model.dense", (3500, 700), SIZES, "the widths of the hidden dense layers", CONVNET),
    Key(
        "model.dropout",
        (0.0, 0.0),
        RATES,
        "the fraction that is dropped after each hidden dense layer",
        CONVNET,
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
        each("True or False for each hidden dense layer", lambda value: type(value) is bool),
        "whether the output of each hidden dense layer is normalised",
        CONVNET,
    ),
    Key(
        "model.placement",
        "pre",
        one_of("pre", "before", "after"),
        "of the norms: pre, at the input of each layer (in a ResNet: norm, activation, "
        "convolution); before or after the activation of each layer",
        NOT_SPEEDNET,
    ),
    Key(
        "model.momentum",
        0.75,
        Check(f"{FRACTION.words} (the fraction of the old average that is kept)", FRACTION.holds),
        "of the running averages: the fraction of the old average that a step keeps",
        norm="momentum",
    ),
    Key(
        "model.debias",
        False,
        FLAG,
        "correct the averages for their starting values",
        norm="debias",
    ),
    Key(
        "model.variance",
        "biased",
        one_of("biased", "unbiased"),
        "the variance that is averaged: divided by n, or by n - 1",
        norm="variance",
    ),
    Key(
        "model.average_dtype",
        "float32",
        DTYPE,
        "the running averages are rounded to it after each step; bfloat16 is for studies",
        norm="average_dtype",
    ),
    Key(
        "model.statistics_over",
        "global",
        OVER,
        "batch norms normalise over the batch of all devices, of each, or of so many together; "
        "running averages are always those of all",
    ),
    Key(
        "model.virtual_batch",
        50,
        whole(2),
        "ghost: images of a virtual batch",
        norm="virtual_batch",
    ),
    Key(
        "model.renorm_steps",
        40_000,
        whole(2),
        "renorm: the step from which its limits are open",
        norm="renorm_steps",
    ),
    Key("model.groups", 10, whole(1), "group: how many groups of channels", norm="groups"),
    Key("model.epsilon", 1e-3, POSITIVE, "added to variances", norm="epsilon"),
    Key(
        "model.activation",
        "relu",
        one_of("relu", "sigmoid", "tanh", "gelu", "silu"),
        "of each hidden layer; norm frn brings its own",
    ),
    Key(
        "model.use_scale",
        True,
        FLAG,
        "whether norms learn a scale for each channel",
        norm="use_scale",
        was="model.scale",
    ),
    Key(
        "model.use_bias",
        True,
        FLAG,
        "whether norms learn a shift for each channel",
        norm="use_bias",
        was="model.shift",
    ),
    Key(
        "model.weight_standardization",
        False,
        FLAG,
        "standardise the kernels of the convolutions",
        NOT_SPEEDNET,
    ),
    Key(
        "model.dtype",
        "float32",
        one_of("float32", "bfloat16", "auto"),
        "of the arithmetic; parameters, statistics and metrics are float32, while gradients of "
        "kernels are of this dtype until they have been summed over devices; auto: bfloat16 on "
        "accelerators, float32 on CPUs",
    ),
    Key(
        "model.dense_product",
        "float32",
        DTYPE,
        "the operands of the dense layers' products; bfloat16 is for CPUs that are faster at it",
        CONVNET,
    ),
    Key("optimizer.name", "adam", one_of("adam", "sgd", "muon"), "which optimizer"),
    Key("optimizer.learning_rate", 1e-3, POSITIVE, "the highest over the run"),
    Key(
        "optimizer.schedule",
        "constant",
        one_of("constant", "linear", "cosine", "one_cycle"),
        "how the rate falls to 0: not at all, in a line or along a cosine; one_cycle: it rises "
        "from a 25th and falls along cosines",
    ),
    Key(
        "optimizer.warmup",
        0.0,
        FRACTION,
        "the fraction of the steps in which the rate first rises, from 0 in a line",
    ),
    Key(
        "optimizer.reduction",
        "mean",
        one_of("mean", "sum"),
        "of a batch's losses, whose gradient rates and decay are meant for; metrics are means",
        was="optimizer.loss",
    ),
    Key(
        "optimizer.weight_decay",
        0.0,
        AMOUNT,
        "sgd: times the weight is added to the gradient; adam: to the step, before the rate "
        "(AdamW); muon: to the steps of its sgd part, as if their highest rate were 1",
    ),
    Key(
        "optimizer.weight_decay_mask",
        "kernels",
        one_of("kernels", "all"),
        "weight_decay is for the kernels of convolutions and dense layers, or for biases and "
        "scales too",
        was="optimizer.decay",
    ),
    Key("optimizer.b1", 0.9, FRACTION, "adam: the decay of the mean gradient"),
    Key("optimizer.b2", 0.999, FRACTION, "adam: the decay of the mean squared gradient"),
    Key("optimizer.eps", 1e-8, POSITIVE, "adam: added to the root of the mean squared gradient"),
    Key(
        "optimizer.momentum",
        0.0,
        FRACTION,
        "sgd, also beside muon: the fraction of the last update that is kept",
        was="muon.momentum",
    ),
    Key(
        "optimizer.nesterov", False, FLAG, "sgd: look one update ahead; beside muon it always does"
    ),
    Key("muon.beta", 0.6, FRACTION, "the decay of muon's mean gradient"),
    Key("muon.bias_rate", 0.05, POSITIVE, "of biases and scales, which sgd trains"),
    Key("muon.head_rate", 0.5, POSITIVE, "of dense kernels, which sgd trains"),
    Key(
        "muon.whiten_steps",
        0,
        whole(0),
        "speednet: steps after which the bias of the whitening is no longer trained; 0: all",
    ),
    Key(
        "muon.rescale_every",
        (1, 0),
        Check(
            "two whole numbers, the first above 0",
            lambda value: len(value) == 2 and is_whole(value[0], 1) and is_whole(value[1], 0),
        ),
        "(a, b): kernels of convolutions are rescaled to the norm sqrt(output channels) each a "
        "steps, and later more seldom: each a + int(b * the part of training that is over)",
    ),
    Key(
        "optimizer.average",
        "none",
        one_of("none", "ema", "swa"),
        "evaluate and predict with this average of the weights, always under precise statistics "
        "of its own (eval.precise_images); training goes on without it",
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
        "process a batch in so many parts, to save memory; batch norms normalise each by itself",
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
        "evaluate under training's running averages, or under the mean and variance of training "
        "images, computed anew each time. A checkpoint holds the statistics that were evaluated, "
        "for predict, and training's own",
    ),
    Key(
        "eval.precise_images",
        10_000,
        whole(2),
        "precise: of how many training images, evenly spaced in the data, in batches of about "
        "train.batch_size that are normalised one by one",
    ),
    Key(
        "eval.views",
        1,
        Check("1, 2 or 6", lambda value: value in (1, 2, 6)),
        "average the logits of so many views of each image: 2, with the mirror; 6, with both "
        "shifted by a pixel twice besides",
    ),
    Key(
        "eval.views_share",
        1.0,
        SHARE,
        "of the images of a batch: the least certain get all views, the others one",
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
        "training images whose activations and gradients are shown as histograms",
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


def keys_as_text() -> str:
    """Returns every key with its default, its purpose and the allowed values, for --help."""
    lines = []
    for key in KEYS:
        default = ",".join(map(str, key.default)) if isinstance(key.default, tuple) else key.default
        only = f"with {key.needs[0]} = {' or '.join(key.needs[1])}: " if key.needs else ""
        text = f"{only}{key.help} ({key.allowed.words})"
        wrapped = textwrap.wrap(text, 94, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += [f"  --config.{key.name}={default}", *wrapped]
    return "\n".join(["The keys of the config, with their defaults:", *lines])


def check_values(config: ConfigDict) -> None:
    """Checks each value by itself, and that keys which do not exist here have their defaults.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    for key in KEYS:
        value = get(config, key.name)
        if not key.allowed.holds(value):
            raise ConfigError(key.name, value, key.allowed.words)
        if key.needs and value != key.default:
            other, values = key.needs
            if (given := get(config, other)) not in values:
                allowed = f"{key.default!r}, because {other} = {given!r} does not have this key"
                raise ConfigError(key.name, value, allowed)


def norm_options(model: ConfigDict) -> dict[str, Any]:
    """Returns the values in the section `model` that set fields of the norms, by their fields."""
    return {key.norm: model[key.name.removeprefix("model.")] for key in KEYS if key.norm}


def get(config: ConfigDict, name: str) -> Any:
    """Returns the value of a key, given with its section."""
    value = config
    for part in name.split("."):
        value = value[part]
    return value
