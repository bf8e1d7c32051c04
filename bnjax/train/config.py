"""Declares every config key, with its type, allowed values, default and purpose."""

import ast
import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

from ml_collections import ConfigDict

from bnjax.errors import ConfigError

MAX_SIZE = 1 << 20  # the largest width of a layer; a larger number is probably a typo
MAX_SIDE = 1 << 14  # the largest side of an image, in pixels
NETWORKS = ("convnet", "speednet", "resnet18", "resnet20", "resnet50")


class Check(NamedTuple):
    """Describes the allowed values of a key in words, and checks values of the key's type."""

    words: str
    holds: Callable[[Any], bool]


class Only(NamedTuple):
    """Marks a key that may differ from its default only with certain values of another key."""

    key: str
    values: tuple[str, ...]


def one_of(*values: str) -> Check:
    """Allows only these strings."""
    return Check(", ".join(values), lambda value: value in values)


def whole(low: int, high: float = math.inf, words: str = "") -> Check:
    """Allows whole numbers from `low` to `high`."""
    return Check(words or f"a whole number, {low} or above", lambda value: low <= value <= high)


def each(words: str, holds: Callable[[Any], bool]) -> Check:
    """Allows tuples in which `holds` is true for each value."""
    return Check(words, lambda values: all(map(holds, values)))


def is_whole(value: Any, low: int) -> bool:
    """Returns whether an entry of a tuple is a whole number of at least `low`."""
    return type(value) is int and low <= value <= MAX_SIZE


def is_number(value: Any, above: float) -> bool:
    """Returns whether an entry of a tuple is a finite number greater than `above`."""
    return isinstance(value, int | float) and above < value < math.inf


Fraction = Annotated[float, Check("at least 0 and below 1", lambda value: 0 <= value < 1)]
Positive = Annotated[float, Check("a number above 0", lambda value: 0 < value < math.inf)]
Amount = Annotated[float, Check("a number, 0 or above", lambda value: 0 <= value < math.inf)]
Share = Annotated[float, Check("above 0, at most 1", lambda value: 0 < value <= 1)]
# Steps are counted in int32.
DURATION = "a number above 0 and below 2**31, or 0 "
Steps = Annotated[int, whole(0, 2**31 - 1, f"{DURATION}to use the other unit")]
Epochs = Annotated[float, whole(0, 2**31 - 1, f"{DURATION}to use the other unit")]
SaveSteps = Annotated[int, whole(0, 2**31 - 1, f"{DURATION}for none")]
SaveTime = Annotated[float, whole(0, 2**31 - 1, f"{DURATION}for none")]
Step = Annotated[int, whole(1, 2**31 - 1, "a whole number above 0 and below 2**31")]
Seed = Annotated[int, whole(0, 2**32 - 1, "a whole number from 0 up to 2**32 - 1")]
Count = Annotated[int, whole(0)]
AtLeast1 = Annotated[int, whole(1)]
AtLeast2 = Annotated[int, whole(2)]
Images = Annotated[int, whole(0, MAX_SIZE, f"a whole number up to {MAX_SIZE:,}, or 0 for none")]
Pixels = Annotated[int, whole(0, MAX_SIDE, f"a whole number of pixels up to {MAX_SIDE:,}, or 0")]
UpTo100 = Annotated[int, whole(0, 100, "a whole number from 0 up to 100")]
Workers = Annotated[int, whole(0, 1024, "a whole number up to 1,024")]
Dtype = Annotated[str, one_of("float32", "bfloat16")]
Sizes = Annotated[
    tuple, each(f"whole numbers above 0, up to {MAX_SIZE:,}", lambda size: is_whole(size, 1))
]
Rates = Annotated[
    tuple,
    each(
        "fractions, each at least 0 and below 1",
        lambda rate: rate == 0 or (is_number(rate, 0) and rate < 1),
    ),
]
Labels = Annotated[tuple, each("whole numbers, 0 or above", lambda label: is_whole(label, 0))]
Patterns = Annotated[tuple, each("strings", lambda pattern: isinstance(pattern, str))]
Flags = Annotated[tuple, each("True or False for each", lambda value: type(value) is bool)]
Numbers = Annotated[tuple, each("numbers", lambda value: is_number(value, -math.inf))]
Positives = Annotated[tuple, each("numbers above 0", lambda value: is_number(value, 0))]

MEMORY, STREAM = Only("data.pipeline", ("memory",)), Only("data.pipeline", ("stream",))
CONVNET, SPEEDNET = Only("model.name", ("convnet",)), Only("model.name", ("speednet",))
WITH_FILTERS = Only("model.name", ("convnet", "speednet"))
ADAM = Only("optimizer.name", ("adam",))
NOT_CONVNET = Only("model.name", NETWORKS[1:])
NOT_SPEEDNET = Only("model.name", tuple(name for name in NETWORKS if name != "speednet"))


class Run:
    """The top-level keys, which belong to no section."""

    name: str = ""
    "the name of the run; empty: the name of the config file"
    seed: Seed = 0
    "the seed for initial weights, the order of the images, augmentation and dropout"
    devices: Count = 0
    "the number of devices to use, which does not change the batch size; 0: all devices"


class Data:
    """The section `data`."""

    name: Annotated[
        str,
        Check("cifar10, cifar100, digits, records, folder, or the name of a TFDS data set", bool),
    ] = "cifar10"
    """the data set: cifar10, cifar100, digits, or the name of a data set in TensorFlow Datasets;
    records: array_record files in data.dir; folder: images in data.dir, as train/CLASS/*.jpg and
    test/CLASS/*.jpg"""
    dir: str = ""
    """the folder of the data: cifar-10-batches-bin or cifar-10-binary.tar.gz, array_record files,
    images, or a TFDS data_dir"""
    fallback: Annotated[
        str, Check("'digits', or '' for none", lambda value: value in ("", "digits"))
    ] = ""
    "digits: train on the embedded digits if the data set is unavailable; empty: raise an error"
    label: str = ""
    "the name of the data set in summaries and tables; empty: data.name"
    train_images: Annotated[int, whole(0, words="a whole number above 0, or 0 for all")] = 0
    "train on only this many images, counted from the first; 0: all images"
    classes: Annotated[Labels, MEMORY] = ()
    """the numbers of the classes whose images are used in training and testing; the network still
    has an output for every class; empty: all classes"""
    validation: Annotated[Count, MEMORY] = 0
    """hold out this many training images for validation, from each class in proportion to its size;
    the best checkpoint and train.patience depend on the validation images, and the test images are
    evaluated only once, at the end. 0: use the test images instead of validation images"""
    validation_seed: Annotated[Seed, MEMORY] = 0
    "the seed that selects the validation images; the same for all seeds of a comparison"
    pipeline: Annotated[str, one_of("memory", "stream")] = "memory"
    "memory: load all images into memory; stream: read files during training"
    image_size: Annotated[Pixels, STREAM] = 0
    "the side of the square crop; 0: no crop"
    shorter_side: Annotated[Pixels, STREAM] = 0
    "the length to which the shorter side is resized before the crop; 0: image_size"
    crop: Annotated[str, one_of("centre", "random", "random_resized"), STREAM] = "centre"
    """the crop of training images. centre, random: a square from the centre or from a random
    position in the resized image; random_resized: a random box with 8 to 100 % of the area and an
    aspect ratio from 3/4 to 4/3, resized"""
    workers: Annotated[Workers, STREAM] = 0
    "the number of processes that read ahead, which does not affect results; 0: use threads"


class Augment:
    """The section `augment`: operations on the device, in the order in which they are applied."""

    flip: Annotated[str, one_of("none", "random", "alternating")] = "none"
    """mirror images; random: with probability 1/2; alternating: a random half of the images in even
    epochs, the other half in odd epochs"""
    translate: Pixels = 0
    "shift images by up to this many pixels; edges are reflected"
    crop: Pixels = 0
    "shift images by up to this many pixels; the new border is black"
    brightness: Amount = 0.0
    "raise or lower the brightness by up to this amount; white is 1"
    contrast: Amount = 0.0
    "raise or lower the contrast by up to this fraction"
    cutout: Pixels = 0
    "blank a square with sides of this many pixels"
    mixup: Amount = 0.0
    "mix pairs of images in proportions drawn from Beta(mixup, mixup); 0: no mixing"


class Norm:
    """The keys of the section `model` that are fields of the classes in `bnjax.norms`."""

    momentum: Fraction = 0.75
    "the fraction of the old running average that a step keeps"
    debias: bool = False
    "correct the running averages for their starting values"
    variance: Annotated[str, one_of("biased", "unbiased")] = "biased"
    "the variance that enters the running average; biased: divided by n; unbiased: by n - 1"
    average_dtype: Dtype = "float32"
    "round the running averages to this dtype after each step; bfloat16 is for experiments"
    epsilon: Positive = 1e-3
    "the constant added to each variance before the square root"
    use_scale: bool = True
    "whether norms learn a scale for each channel"
    use_bias: bool = True
    "whether norms learn a shift for each channel"
    virtual_batch: AtLeast2 = 50
    "ghost: the number of images in a virtual batch"
    renorm_steps: AtLeast2 = 40_000
    "renorm: the step at which the limits of r and d reach their final values"
    groups: AtLeast1 = 10
    "group: the number of groups of channels"


class Model(Norm):
    """The section `model`."""

    name: Annotated[str, one_of(*NETWORKS)] = "convnet"
    "the network; convnet: the network of the tutorial"
    mean: Annotated[Numbers, NOT_CONVNET] = ()
    "the value subtracted from the pixels of each channel; white is 1; empty: subtract nothing"
    std: Annotated[Positives, NOT_CONVNET] = ()
    "the value by which the pixels of each channel are divided; empty: do not divide"
    filters: Annotated[Sizes, WITH_FILTERS] = (30, 50, 60)
    "the number of channels of each convolution; speednet: of each group of two convolutions"
    whiten_images: Annotated[AtLeast1, SPEEDNET] = 5000
    "the number of training images whose 2x2 patches initialise the whitening convolution"
    kernels: Annotated[Sizes, CONVNET] = (3, 3, 3)
    "the kernel size of each convolution, in pixels"
    strides: Annotated[Sizes, CONVNET] = (2, 1, 1)
    "the stride of each convolution, or of the pooling after it"
    pooling: Annotated[str, one_of("none", "max", "avg"), CONVNET] = "none"
    """none: convolutions are strided; max, avg: each convolution is followed by pooling with its
    stride"""
    dense: Annotated[Sizes, CONVNET] = (3500, 700)
    "the widths of the hidden dense layers"
    dropout: Annotated[Rates, CONVNET] = (0.0, 0.0)
    "the dropout rate after each hidden dense layer"
    norm: Annotated[
        str, one_of("batch", "ghost", "renorm", "layer", "group", "instance", "rms", "frn", "none")
    ] = "batch"
    "the normalisation layer"
    norm_dense: Annotated[Flags, CONVNET] = (True, True)
    "whether the output of each hidden dense layer is normalised"
    placement: Annotated[str, one_of("pre", "before", "after"), NOT_SPEEDNET] = "pre"
    """the position of the norms; pre: at the input of each layer (in a ResNet: norm, activation,
    convolution); before, after: before or after the activation of each layer"""
    statistics_over: Annotated[
        str,
        Check(
            "global, per_device, or a number of devices",
            lambda value: value in ("global", "per_device") or (value.isdecimal() and value > "0"),
        ),
    ] = "global"
    """the devices over which batch norms normalise: all of them, each one separately, or groups
    with this number of devices; running averages are always taken over all devices"""
    activation: Annotated[str, one_of("relu", "sigmoid", "tanh", "gelu", "silu")] = "relu"
    "the activation of each hidden layer; norm frn has its own activation"
    weight_standardization: Annotated[bool, NOT_SPEEDNET] = False
    "standardise the kernels of the convolutions"
    dtype: Annotated[str, one_of("float32", "bfloat16", "auto")] = "float32"
    """the dtype used for arithmetic; parameters, statistics and metrics are float32, and gradients
    of kernels have this dtype until they are summed over devices; auto: bfloat16 on accelerators,
    float32 on CPUs"""
    dense_product: Annotated[Dtype, CONVNET] = "float32"
    "the dtype of the operands of dense layers; bfloat16 is faster on some CPUs"


class Optimizer:
    """The section `optimizer`."""

    name: Annotated[str, one_of("adam", "sgd", "muon")] = "adam"
    "the optimizer"
    learning_rate: Positive = 1e-3
    "the peak learning rate"
    schedule: Annotated[str, one_of("constant", "linear", "cosine", "one_cycle", "steps")] = (
        "constant"
    )
    """how the rate changes; constant: not at all; linear, cosine: it falls to 0; one_cycle: it
    rises from 1/25 of the peak to the peak and then falls, both along a cosine; steps: it is
    divided by 10 at each entry of drops"""
    drops: Annotated[Rates, Only("optimizer.schedule", ("steps",))] = ()
    "the points at which the rate is divided by 10, as fractions of the total number of steps"
    warmup: Fraction = 0.0
    """the fraction of the total number of steps during which the rate rises linearly from 0;
    one_cycle: 0 means 0.3"""
    reduction: Annotated[str, one_of("mean", "sum")] = "mean"
    "the loss that is differentiated: the mean or the sum over the batch; metrics are always means"
    weight_decay: Amount = 0.0
    """this multiple of each weight is added; sgd: to its gradient; adam: to its update, before the
    rate is applied (AdamW); muon: divided by the peak rate, to the gradients of weights that sgd
    trains"""
    weight_decay_mask: Annotated[str, one_of("kernels", "all")] = "kernels"
    """the weights that decay; kernels: kernels of convolutions and dense layers; all: also biases
    and scales"""
    b1: Annotated[Fraction, ADAM] = 0.9
    "the decay rate of the average gradient"
    b2: Annotated[Fraction, ADAM] = 0.999
    "the decay rate of the average squared gradient"
    eps: Annotated[Positive, ADAM] = 1e-8
    "the constant added to the root of the average squared gradient"
    momentum: Annotated[Fraction, Only("optimizer.name", ("sgd", "muon"))] = 0.0
    "the fraction of the previous update that is kept; muon: for the weights that sgd trains"
    nesterov: Annotated[bool, Only("optimizer.name", ("sgd",))] = False
    "use Nesterov momentum; muon always does"
    average: Annotated[str, one_of("none", "ema", "swa")] = "none"
    """evaluate and predict with this average of the weights, always under precise statistics
    computed for the averaged weights (eval.precise_images); training does not use the average"""
    average_decay: Annotated[Fraction, Only("optimizer.average", ("ema",))] = 0.99
    "the fraction of the old average that a step keeps"
    average_start: Step = 1
    "the first step whose weights enter the average"
    average_every: Step = 1
    "the interval, in steps, at which weights enter the average"


class Muon:
    """The section `muon`."""

    beta: Fraction = 0.6
    "the decay rate of the average gradient in muon"
    bias_rate: Positive = 0.05
    "the peak learning rate of biases and scales, which are trained by sgd"
    head_rate: Positive = 0.5
    "the peak learning rate of dense kernels, which are trained by sgd"
    whiten_steps: Count = 0
    "speednet: the number of steps in which the bias of the whitening layer is trained; 0: all"
    rescale_every: Annotated[
        tuple,
        Check(
            "two whole numbers, the first above 0",
            lambda value: len(value) == 2 and is_whole(value[0], 1) and is_whole(value[1], 0),
        ),
    ] = (1, 0)
    """(a, b): kernels of convolutions are rescaled to the norm sqrt(output channels) every a +
    int(b * progress) steps, where progress rises from 0 to 1 during the run"""


class Train:
    """The section `train`; exactly one of `steps` and `epochs` is not 0."""

    from_: str = ""
    """a folder written by bnjax train, port, precise, fold or export; training starts from its
    parameters and statistics, matched by name; the command-line option is --from"""
    freeze: Annotated[str, one_of("none", "statistics", "norms", "backbone")] = "none"
    """the values that training leaves unchanged; statistics: the running statistics of all norms,
    which then normalise with these statistics in training too; norms: the statistics, scales and
    biases of all norms; backbone: everything except the last layer"""
    freeze_statistics: Patterns = ()
    "patterns such as stage0.* that name further norms whose statistics are frozen"
    freeze_params: Patterns = ()
    "patterns such as conv0.kernel or stage0.* that name further parameters to freeze"
    steps: Steps = 100
    "the duration of training in steps"
    epochs: Epochs = 0.0
    "the duration of training in epochs"
    batch_size: AtLeast1 = 5000
    "the number of images per step, over all devices"
    micro_batches: AtLeast1 = 1
    "process a batch in this many parts to save memory; batch norms normalise each part separately"
    shuffle: bool = False
    "shuffle the training images in each epoch; False: use the order of the files"
    label_smoothing: Fraction = 0.0
    "the fraction of each label that the training loss spreads evenly over all classes"
    target_loss: Positive = 0.2
    "the summary records the first step with a training loss at or below this value"
    stop_at_loss: Amount = 0.0
    "end training at the first step with a loss at or below this value; 0: take all steps"
    patience: Count = 0
    "end training after this many consecutive evaluations without a better accuracy; 0: never"
    time_products: bool = True
    """on CPUs, time large matrix products with each of XLA's libraries before the first step, and
    use the fastest library; False: always use the same library, so that results do not depend on
    timings"""
    on_nonfinite: Annotated[str, one_of("stop", "skip")] = "stop"
    "after a step with a non-finite loss, gradient or statistic: stop training, or skip the step"
    most_skipped: Count = 10
    "on_nonfinite = skip: stop after more than this many consecutive non-finite steps"


class Eval:
    """The section `eval`; each evaluation is followed by a checkpoint."""

    every_steps: Steps = 0
    "the interval between evaluations in steps"
    every_epochs: Epochs = 2.0
    "the interval between evaluations in epochs"
    batch_size: AtLeast1 = 1000
    "the number of images that are evaluated at once"
    statistics: Annotated[str, one_of("running", "precise")] = "running"
    """evaluate under the running averages from training, or under the mean and variance of training
    images, recomputed at each evaluation. A checkpoint stores the statistics used in evaluation and
    those used in training"""
    precise_images: AtLeast2 = 10_000
    """precise: the number of training images, evenly spaced in the data set; they are normalised in
    separate batches of about train.batch_size images"""
    views: Annotated[int, Check("1, 2 or 6", lambda value: value in (1, 2, 6))] = 1
    """average the logits of this many views of each image; 2: the image and its mirror image; 6:
    these two images and two copies of each, shifted by a pixel"""
    views_share: Share = 1.0
    """the fraction of each batch (its least certain images) that is evaluated in all views; the
    other images are evaluated in one view"""
    gap_images: Images = 256
    """the number of training images that each evaluation runs both under the running averages and
    under batch statistics, to measure the error of the averages and its effect on the loss"""
    histograms: Images = 256
    "the number of training images for histograms of activations and gradients"
    pictures: UpTo100 = 12
    "the number of test images that TensorBoard shows with their predictions at each evaluation"


class Checkpoint:
    """The section `checkpoint`: saves between evaluations; at most one key may be above 0."""

    every_steps: SaveSteps = 0
    "also save between evaluations, at this interval in steps"
    every_epochs: SaveTime = 0.0
    "also save between evaluations, at this interval in epochs"
    every_minutes: SaveTime = 0.0
    "also save between evaluations, at this interval in minutes"


SECTIONS = {
    "": Run,
    "data": Data,
    "augment": Augment,
    "model": Model,
    "optimizer": Optimizer,
    "muon": Muon,
    "train": Train,
    "eval": Eval,
    "checkpoint": Checkpoint,
}
# Durations with a key for each unit: a command line that sets one key sets the others to 0.
UNITS = (
    ("train.steps", "train.epochs"),
    ("eval.every_steps", "eval.every_epochs"),
    ("checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.every_minutes"),
)


class Key(NamedTuple):
    """One of the keys declared above; `name` includes the section, as in "model.norm"."""

    name: str
    default: Any
    allowed: Check
    only: Only | None
    help: str


# The statements of each class in this file, which `inspect.getsource` would parse for each class.
_BODIES = {
    one.name: one.body
    for one in ast.parse(Path(__file__).read_text("utf-8")).body
    if isinstance(one, ast.ClassDef)
}


def _declared(section: str, kind: type) -> Iterator[Key]:
    """Yields the keys of a class: its annotated fields, each followed by its purpose."""
    hints = get_type_hints(kind, include_extras=True)
    _, *body = _BODIES[kind.__name__]
    for field, text in zip(body[::2], body[1::2], strict=True):
        assert isinstance(field, ast.AnnAssign)
        field_name = ast.unparse(field.target)
        name = field_name.removesuffix("_")  # `from` is a keyword
        default = getattr(kind, field_name)
        extra = {type(one): one for one in get_args(hints[field_name])[1:]}
        any_value = "any string" if isinstance(default, str) else "True or False"
        yield Key(
            f"{section}.{name}".lstrip("."),
            default,
            extra.get(Check, Check(any_value, lambda value: True)),
            extra.get(Only),
            " ".join(ast.literal_eval(ast.unparse(text)).split()),
        )


KEYS = tuple(
    key
    for section, kind in SECTIONS.items()
    for of in reversed(kind.__mro__[:-1])
    for key in _declared(section, of)
)


def default_config() -> ConfigDict:
    """Returns a config in which all keys have their defaults."""
    values: dict[str, Any] = {}
    for key in KEYS:
        section, _, name = key.name.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = key.default
    return ConfigDict(values)


def keys_as_text() -> str:
    """Returns the text for --help: every key with its default, purpose and allowed values."""
    lines = []
    for key in KEYS:
        default = ",".join(map(str, key.default)) if isinstance(key.default, tuple) else key.default
        only = f"with {key.only.key} = {' or '.join(key.only.values)}: " if key.only else ""
        text = f"{only}{key.help} ({key.allowed.words})"
        wrapped = textwrap.wrap(text, 94, initial_indent=" " * 6, subsequent_indent=" " * 6)
        lines += [f"  --config.{key.name}={default}", *wrapped]
    return "\n".join(["The keys of the config, with their defaults:", *lines])


def check_values(config: ConfigDict) -> None:
    """Checks each value, and that keys whose `Only` condition does not hold have their defaults.

    Raises:
        ConfigError: if a value is not allowed; gives the key, its value and the allowed values.
    """
    for key in KEYS:
        value = config[key.name]
        if not key.allowed.holds(value):
            raise ConfigError(key.name, value, key.allowed.words)
        if key.only and value != key.default:
            given = config[key.only.key]
            if given not in key.only.values:
                allowed = f"{key.default!r}, because {key.only.key} = {given!r} does not use it"
                raise ConfigError(key.name, value, allowed)


def norm_options(model: ConfigDict) -> dict[str, Any]:
    """Returns the values in the section `model` that are fields of the norms."""
    return {name: model[name] for name in Norm.__annotations__}
