"""A config in, checked and built objects out: the last place that knows what the keys are called."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from bnjax import norms
from bnjax.data import datasets
from bnjax.data.datasets import DIGITS, Dataset
from bnjax.errors import ConfigError
from bnjax.models.convnet import ACTIVATIONS, POOLS, ConvNet
from bnjax.models.products import bfloat16_dot_general
from bnjax.train import optim

DTYPES = ("float32", "bfloat16")
LARGEST = 1 << 20  # of a layer: beyond it is a slip of the finger
MOST_PICTURES = 100  # that are still looked at


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config means for a data set: everything that the loop needs, durations in steps."""

    model: ConvNet
    tx: optax.GradientTransformation
    steps: int
    stop_at_loss: float | None  # training ends when the loss of a step first is at or below it
    eval_every: int
    batch_size: int
    eval_batch_size: int
    product: str  # the dtype of what the dense layers multiply
    histograms: int  # training images
    pictures: int  # test images
    shuffle: bool
    most_skipped: int  # steps in a row that may be dropped because they are not finite
    save_every: int | None  # steps, beside the evaluations
    save_every_minutes: float | None
    warnings: tuple[str, ...]


def experiment(config: ConfigDict, dataset: Dataset) -> Experiment:
    """Returns what to train and for how long, after checking every value; nothing is compiled.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    examples = len(dataset.train.label)
    batch_size = config.train.batch_size
    if dataset.fallback_reason:
        batch_size = examples // 10  # the tutorial's ratio of the batch to the training set
    smallest = 2 if config.model.norm in norms.BATCH_NORMS else 1
    if not smallest <= batch_size <= examples:
        raise ConfigError(
            "train.batch_size",
            batch_size,
            f"{smallest} up to the {examples} training images of {dataset.label}",
        )
    if config.eval.batch_size < 1:
        raise ConfigError("eval.batch_size", config.eval.batch_size, "a whole number above 0")
    if not (config.eval.histograms == 0 or smallest <= config.eval.histograms <= LARGEST):
        raise ConfigError(
            "eval.histograms",
            config.eval.histograms,
            f"a whole number, {smallest} or above, or 0 for none",
        )
    if not 0 <= config.eval.pictures <= MOST_PICTURES:
        raise ConfigError(
            "eval.pictures", config.eval.pictures, f"a whole number from 0 up to {MOST_PICTURES}"
        )
    if config.train.target_loss <= 0:
        raise ConfigError("train.target_loss", config.train.target_loss, "a number above 0")
    if not 0 <= config.train.stop_at_loss < float("inf"):
        raise ConfigError(
            "train.stop_at_loss",
            config.train.stop_at_loss,
            "a number above 0, or 0 to take every step",
        )
    if not 0 <= config.seed < 1 << 32:
        raise ConfigError("seed", config.seed, "a whole number from 0 up to 2**32 - 1")
    if config.train.on_nonfinite not in ("stop", "skip"):
        raise ConfigError("train.on_nonfinite", config.train.on_nonfinite, "stop, skip")
    if config.train.most_skipped < 0:
        raise ConfigError(
            "train.most_skipped", config.train.most_skipped, "a whole number, 0 or above"
        )
    saves = config.checkpoint
    for key in saves:
        if not 0 <= saves[key] < float("inf") or sum(bool(saves[key]) for key in saves) > 1:
            raise ConfigError(
                f"checkpoint.{key}",
                saves[key],
                "a number above 0, or 0 for none; at most one of the three",
            )
    steps = optim.steps_of(config.train, "", "train", batch_size, examples)
    return Experiment(
        model=model(config.model, len(dataset.classes), dataset.train.image.shape[1:]),
        tx=optim.build(config.optimizer),
        steps=steps,
        stop_at_loss=config.train.stop_at_loss or None,
        eval_every=optim.steps_of(config.eval, "every_", "eval", batch_size, examples),
        batch_size=batch_size,
        eval_batch_size=min(config.eval.batch_size, len(dataset.test.label)),
        product="bfloat16"
        if "bfloat16" in (config.model.dtype, config.model.dense_product)
        else "float32",
        histograms=min(config.eval.histograms, examples),
        pictures=min(config.eval.pictures, len(dataset.test.label)),
        shuffle=config.train.shuffle,
        most_skipped=config.train.most_skipped if config.train.on_nonfinite == "skip" else 0,
        save_every=optim.steps_of(saves, "every_", "checkpoint", batch_size, examples)
        if saves.every_steps or saves.every_epochs
        else None,
        save_every_minutes=saves.every_minutes or None,
        warnings=_warnings(config, steps),
    )


def dataset(config: ConfigDict) -> Dataset:
    """Returns the data set that `config.data` describes; errors as `bnjax.data.datasets.load`."""
    data = config.data
    return datasets.load(
        data.name,
        data.dir,
        fallback=data.fallback,
        label=data.label,
        train_images=data.train_images,
    )


def check(config: ConfigDict) -> None:
    """Checks what needs no data, so that a mistake shows before anything is downloaded.

    Raises:
        ConfigError: for a data set's fallback that does not exist, or anything wrong with the optimizer or the model.
    """
    if not config.data.name:
        raise ConfigError(
            "data.name", config.data.name, "cifar10, cifar100, digits, or the name of a TFDS set"
        )
    if config.data.fallback not in ("", DIGITS):
        raise ConfigError("data.fallback", config.data.fallback, f"{DIGITS!r}, or '' for none")
    if config.data.train_images < 0:
        raise ConfigError(
            "data.train_images", config.data.train_images, "a whole number above 0, or 0 for all"
        )
    optim.build(config.optimizer)
    model(config.model, classes=10, image_shape=(1 << 20, 1 << 20, 3))


def model(config: ConfigDict, classes: int, image_shape: tuple[int, int, int]) -> ConvNet:
    """Returns the network that `config.model` describes for images [h, w, c].

    Raises:
        ConfigError: for an impossible value, or if the images shrink to nothing.
    """
    _check_layers(config)
    choices = {
        "pooling": ("none", *POOLS),
        "activation": tuple(ACTIVATIONS),
        "dtype": DTYPES,
        "dense_product": DTYPES,
    }
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise ConfigError(f"model.{key}", config[key], ", ".join(allowed))
    if config.dense_product != "float32" and config.dtype != "float32":
        reason = f"float32 with model.dtype = {config.dtype!r}, whose products have such operands already"
        raise ConfigError("model.dense_product", config.dense_product, reason)
    _check_norm(config)
    for side in image_shape[:2]:
        for i, (kernel, stride) in enumerate(zip(config.kernels, config.strides, strict=True)):
            after = (
                (side - kernel) // stride + 1
                if config.pooling == "none"
                else (side - kernel + 1) // stride
            )
            if side < kernel or after < 1:
                room = f"layers that leave at least one pixel; image sides of {image_shape[0]}x{image_shape[1]} are {side} at layer {i}"
                raise ConfigError(
                    "model.kernels and .strides",
                    (tuple(config.kernels), tuple(config.strides)),
                    room,
                )
            side = after
    return ConvNet(
        filters=config.filters,
        kernels=config.kernels,
        strides=config.strides,
        pooling=config.pooling,
        dense=config.dense,
        dropout=tuple(float(rate) for rate in config.dropout),
        classes=classes,
        norm=norms.build(
            config.norm,
            momentum=config.momentum,
            epsilon=config.epsilon,
            use_scale=config.scale,
            use_bias=config.shift,
            variance=config.variance,
            debias=config.debias,
            virtual_batch=config.virtual_batch,
            renorm_steps=config.renorm_steps,
            groups=config.groups,
        ),
        activation=ACTIVATIONS[config.activation],
        norm_activation=norms.ThresholdedLinear if config.norm == "frn" else None,
        conv=norms.StandardizedConv if config.weight_standardization else nn.Conv,
        norm_dense=config.norm_dense,
        placement=config.placement,
        dtype=jnp.dtype(config.dtype),
        dense_product=bfloat16_dot_general if config.dense_product == "bfloat16" else None,
    )


def _check_layers(config: ConfigDict) -> None:
    for key in ("filters", "kernels", "strides", "dense"):
        if not all(type(size) is int and 0 < size <= LARGEST for size in config[key]):
            raise ConfigError(
                f"model.{key}", config[key], f"whole numbers above 0, up to {LARGEST:,}"
            )
    for of, keys in (("filters", ("kernels", "strides")), ("dense", ("dropout", "norm_dense"))):
        for key in keys:
            if len(config[key]) != len(config[of]):
                raise ConfigError(
                    f"model.{key}",
                    config[key],
                    f"as many entries as config.model.{of}, which has {len(config[of])}",
                )
    if not all(isinstance(rate, int | float) and 0 <= rate < 1 for rate in config.dropout):
        raise ConfigError(
            "model.dropout", config.dropout, "fractions from 0 up to but not including 1"
        )
    if not all(isinstance(flag, bool) for flag in config.norm_dense):
        raise ConfigError(
            "model.norm_dense", config.norm_dense, "True or False for each hidden dense layer"
        )


def _check_norm(config: ConfigDict) -> None:
    choices: dict[str, tuple[str, ...]] = {
        "norm": norms.NORMS,
        "placement": ("input", "before", "after"),
        "variance": ("biased", "unbiased"),
    }
    for key, allowed in choices.items():
        if config[key] not in allowed:
            raise ConfigError(f"model.{key}", config[key], ", ".join(allowed))
    if not 0 <= config.momentum < 1:
        raise ConfigError(
            "model.momentum",
            config.momentum,
            "0 up to but not including 1 (the fraction of the old average that is kept)",
        )
    if not 0 < config.epsilon < float("inf"):
        raise ConfigError("model.epsilon", config.epsilon, "a number above 0")
    for key in ("virtual_batch", "renorm_steps"):
        if config[key] < 2:
            raise ConfigError(f"model.{key}", config[key], "a whole number above 1")
    if config.norm in norms.POSITION_NORMS and any(config.norm_dense):
        reason = f"False for every layer with model.norm = {config.norm!r}, which normalises images and not vectors"
        raise ConfigError("model.norm_dense", config.norm_dense, reason)
    if config.norm == "frn" and config.placement != "before":
        raise ConfigError(
            "model.placement",
            config.placement,
            "'before' with model.norm = 'frn', which brings the activation after it",
        )
    if config.norm in ("instance", "group") and config.placement == "input":
        reason = f"'before' or 'after' with model.norm = {config.norm!r}, whose statistics the input of a layer may be too small for"
        raise ConfigError("model.placement", config.placement, reason)
    widths = (
        *config.filters,
        *(
            width
            for width, is_normed in zip(config.dense, config.norm_dense, strict=True)
            if is_normed
        ),
    )
    if config.norm == "group" and (
        config.groups < 1 or any(width % config.groups for width in widths)
    ):
        raise ConfigError(
            "model.groups",
            config.groups,
            f"a number that divides the channels of every normalised layer: {widths}",
        )


def _warnings(config: ConfigDict, steps: int) -> tuple[str, ...]:
    left = config.model.momentum**steps
    if config.model.norm not in norms.BATCH_NORMS or config.model.debias or left <= 0.01:
        return ()
    return (
        f"the running averages will not be ready. With config.model.momentum = {config.model.momentum:g} each step keeps "
        f"{config.model.momentum:.0%} of the old average of means and variances, so after {steps} steps {left:.0%} of what evaluation "
        "uses is still the made-up starting value (mean 0, variance 1), not your data. Training will look fine and test results will "
        f"look bad. Train longer, or lower the momentum: {0.01 ** (1 / steps):.2f} or less leaves at most 1%.",
    )
