"""Builds the network, augmentation, data set and experiment that a config describes."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from bnjax import norms
from bnjax.clinic.freezing import freeze_statistics, without_frozen
from bnjax.data import augment, datasets
from bnjax.data.augment import Augmentation
from bnjax.data.batches import Part
from bnjax.data.datasets import FOLDER, RECORDS, Dataset
from bnjax.data.pictures import Reading
from bnjax.errors import ConfigError
from bnjax.loss import LossFn, softmax_cross_entropy
from bnjax.models.convnet import ACTIVATIONS, ConvNet
from bnjax.models.layers import bfloat16_dot_general, with_views
from bnjax.models.resnet import RESNETS
from bnjax.models.speednet import SpeedNet
from bnjax.norms.running_average import momentum_for
from bnjax.train import parsing
from bnjax.train.config import MAX_SIZE, check_values, norm_options
from bnjax.train.devices import GROUPS, Parallel, spread
from bnjax.train.optimizers import optimizer
from bnjax.train.warm_start import Frozen, frozen
from bnjax.train_step import init_variables

# The keys of the section `model` that are fields of `ConvNet`.
CONVNET_KEYS = ("filters", "kernels", "strides", "pooling", "dense", "norm_dense", "placement")


def check(config: ConfigDict) -> None:
    """Checks everything in a config that can be checked before the data are downloaded.

    Raises:
        ConfigError: if a value is invalid; gives the key, its value and the allowed values.
    """
    check_values(config)
    data = config.data
    if data.name in (RECORDS, FOLDER) and data.pipeline != "stream":
        allowed = f"'stream' with data.name = {data.name!r}"
        raise ConfigError("data.pipeline", data.pipeline, allowed)
    if data.shorter_side and not 0 < data.image_size <= data.shorter_side:
        allowed = f"at least config.data.image_size, {data.image_size}; or 0 for the same"
        raise ConfigError("data.shorter_side", data.shorter_side, allowed)
    if data.crop != "centre" and not data.image_size:
        raise ConfigError("data.crop", data.crop, "centre with data.image_size = 0")
    given = {key: value for key, value in config.checkpoint.items() if value}
    if len(given) > 1:
        key, value = next(iter(given.items()))
        allowed = f"0, because at most one of {', '.join(given)} may be above 0"
        raise ConfigError(f"checkpoint.{key}", value, allowed)
    channels = len(config.model.mean) or 3  # not known until the data are loaded
    network(config.model, classes=10, image_shape=(MAX_SIZE, MAX_SIZE, channels))


def check_batch(config: ConfigDict, dataset: Dataset) -> None:
    """Checks that a batch has enough images for the norm, and the data set enough for a batch."""
    smallest = 2 if config.model.norm in norms.BATCH_NORMS else 1
    images, size, parts = len(dataset.train), config.train.batch_size, config.train.micro_batches
    if not smallest <= size <= images:
        allowed = f"{smallest} up to the {images} training images of {dataset.label}"
        raise ConfigError("train.batch_size", size, allowed)
    if size % parts or size // parts < smallest:
        allowed = f"a number that divides train.batch_size, {size}, into {smallest} images or more"
        raise ConfigError("train.micro_batches", parts, allowed)
    for key in ("histograms", "gap_images"):
        if 0 < config.eval[key] < smallest:
            allowed = f"a whole number, {smallest} or above, or 0 for none"
            raise ConfigError(f"eval.{key}", config.eval[key], allowed)


def network(
    config: ConfigDict, classes: int, image_shape: tuple[int, int, int], **norm_axes: str
) -> nn.Module:
    """Returns the network that `config.model` describes for images [h, w, c].

    Args:
        config: the section `model`, already checked by `check_values`.
        classes: the number of logits.
        image_shape: the shape [h, w, c] of one image.
        norm_axes: the names of the mapped axes over which batch norms share statistics, for
            training on groups of devices.

    Raises:
        ConfigError: if values contradict each other, or the images are too small for the layers.
    """
    shared: dict[str, Any] = {
        "classes": classes,
        "norm": norms.build(config.norm, **norm_options(config), **norm_axes),
        "activation": ACTIVATIONS[config.activation],
        "dtype": jnp.dtype(dtype_of(config)),
    }
    conv = norms.StandardizedConv if config.weight_standardization else nn.Conv
    if config.name == "convnet":
        _check_convnet(config, image_shape)
        return ConvNet(
            **{key: config[key] for key in CONVNET_KEYS},
            dropout=tuple(map(float, config.dropout)),
            norm_activation=norms.ThresholdedLinear if config.norm == "frn" else None,
            conv=conv,
            dense_product=bfloat16_dot_general if config.dense_product == "bfloat16" else None,
            **shared,
        )
    if config.norm == "frn":
        raise ConfigError("model.norm", config.norm, "another norm with this model.name")
    for key in ("mean", "std"):
        if len(config[key]) != (image_shape[-1] if config.mean or config.std else 0):
            allowed = (
                f"{image_shape[-1]} numbers, one per channel, in both mean and std; or none in both"
            )
            raise ConfigError(f"model.{key}", config[key], allowed)
    shared |= {"mean": tuple(config.mean), "std": tuple(config.std)}
    if config.name == "speednet":
        _check_groups(config, config.filters)
        # Whitening removes 1 pixel; each pooling divides the side by 2, the last one by 3.
        least = 3 * 2 ** len(config.filters) + 1
        if min(image_shape[:2]) < least:
            allowed = f"fewer groups: these need images with sides of at least {least} pixels"
            raise ConfigError("model.filters", f"{len(config.filters)} groups", allowed)
        return SpeedNet(widths=config.filters, **shared)
    if config.placement == "after":
        raise ConfigError("model.placement", config.placement, "pre or before in a ResNet")
    made = RESNETS[config.name](placement=config.placement, conv=conv, **shared)
    _check_groups(config, (made.width,))  # the widths of other stages are its multiples
    return made


def _check_convnet(config: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    for of, keys in (("filters", ("kernels", "strides")), ("dense", ("dropout", "norm_dense"))):
        for key in keys:
            if len(config[key]) != len(config[of]):
                allowed = f"as many entries as config.model.{of}, which has {len(config[of])}"
                raise ConfigError(f"model.{key}", config[key], allowed)
    norm = f"model.norm = {config.norm!r}"
    if config.norm in norms.POSITION_NORMS and any(config.norm_dense):
        allowed = f"False for every layer with {norm}, which normalises images but not vectors"
        raise ConfigError("model.norm_dense", config.norm_dense, allowed)
    if config.norm == "frn" and config.placement != "before":
        allowed = f"'before' with {norm}, which includes an activation"
        raise ConfigError("model.placement", config.placement, allowed)
    if config.norm in ("instance", "group") and config.placement == "pre":
        allowed = f"'before' or 'after' with {norm}: the input of a layer may be too small for it"
        raise ConfigError("model.placement", config.placement, allowed)
    normed = zip(config.dense, config.norm_dense, strict=True)
    _check_groups(config, (*config.filters, *(width for width, is_normed in normed if is_normed)))
    if config.dense_product != "float32" and config.dtype != "float32":
        allowed = f"float32 with model.dtype = {config.dtype!r}, which already rounds the operands"
        raise ConfigError("model.dense_product", config.dense_product, allowed)
    for side in image_shape[:2]:
        for i, (kernel, stride) in enumerate(zip(config.kernels, config.strides, strict=True)):
            pooled = config.pooling != "none"
            after = (side - kernel + 1) // stride if pooled else (side - kernel) // stride + 1
            if side < kernel or after < 1:
                raise ConfigError(
                    "model.kernels and .strides",
                    (tuple(config.kernels), tuple(config.strides)),
                    "layers that leave at least one pixel; images of "
                    f"{image_shape[0]}x{image_shape[1]} have a side of {side} at layer {i}",
                )
            side = after


def _check_groups(config: ConfigDict, widths: Sequence[int]) -> None:
    if config.norm == "group" and any(width % config.groups for width in widths):
        allowed = f"a number that divides the channels of every normalised layer: {tuple(widths)}"
        raise ConfigError("model.groups", config.groups, allowed)


def dtype_of(config: ConfigDict) -> str:
    """Returns the dtype used for arithmetic; `config` is the section `model`."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config applied to a data set, with all durations in steps."""

    model: nn.Module
    training_model: nn.Module  # its batch norms use the axis names from `parallel`
    frozen: Frozen
    source: Path | None  # the folder that the initial variables are read from
    tested_model: nn.Module  # averages its logits over several views of each image
    parallel: Parallel
    init_images: int  # the number of training images used for initialisation
    augment: Augmentation | None  # applied to training batches
    loss_fn: LossFn  # the training loss
    tx: optax.GradientTransformation
    steps: int
    patience: int  # training ends after this many evaluations without a new best; 0: never
    stop_at_loss: float | None  # training ends at the first step with a loss this low
    eval_every: int
    batch_size: int
    micro_batches: int  # the number of parts of a batch, processed one after another
    eval_batch_size: int
    times_products: bool  # whether to time matrix products before compiling
    averages: bool  # whether averaged weights are evaluated
    precise_images: int  # used for precise statistics; 0: running statistics
    shuffle: bool
    most_skipped: int  # the number of consecutive bad steps that may be dropped
    save_every: int  # in steps; each evaluation is also followed by a save
    save_every_minutes: float | None
    warnings: tuple[str, ...]

    @property
    def part(self) -> Part:
        """The rows of each batch that this process loads, which split evenly into micro-batches."""
        part, devices = self.parallel.part, self.parallel.mesh.size
        # A single device processes the whole batch.
        multiple = devices * self.micro_batches if devices > 1 else 1
        return dataclasses.replace(part, multiple=multiple)

    @property
    def is_apart(self) -> bool:
        """Whether evaluation and training use different weights or statistics."""
        return self.precise_images > 0


def experiment(config: ConfigDict, dataset: Dataset) -> Experiment:
    """Checks every value of the config and builds the experiment without compiling anything.

    Raises:
        ConfigError: if a value is invalid; gives the key, its value and the allowed values.
    """
    check(config)
    check_batch(config, dataset)
    images, batch_size, saves = len(dataset.train), config.train.batch_size, config.checkpoint
    steps = duration(config.train, "", "train", batch_size, images)
    save_every = steps
    if saves.every_steps or saves.every_epochs:
        save_every = duration(saves, "every_", "checkpoint", batch_size, images)
    parallel = spread_over(config)
    groups = parallel.mesh.shape.get(GROUPS, 1)
    if config.model.norm in norms.BATCH_NORMS and batch_size // config.train.micro_batches < (
        2 * groups
    ):
        allowed = f"groups in which each batch norm has at least 2 of the {batch_size} images"
        raise ConfigError("model.statistics_over", config.model.statistics_over, allowed)
    classes = len(dataset.classes)
    make = functools.partial(network, config.model, classes, dataset.train.image_shape)
    model = make()
    tx, training_model, stays = optimizer(config, steps), make(**parallel.norm_axes), Frozen((), ())
    train = config.train
    if train.freeze != "none" or train.freeze_statistics or train.freeze_params:
        like = np.zeros((1, *dataset.train.image_shape), np.uint8)
        init = functools.partial(init_variables, model, jax.random.key(0))
        shapes: Any = jax.eval_shape(init, like)
        stays = frozen(train, *shapes)
        if stays.params:
            tx = without_frozen(tx, stays.mask(shapes[0]))
        if stays.norms:
            training_model = freeze_statistics(training_model, *stays.norms)
    is_whitened = config.model.name == "speednet"
    return Experiment(
        model=model,
        training_model=training_model,
        frozen=stays,
        source=Path(config.train["from"]) if config.train["from"] else None,
        tested_model=with_views(model, config.eval.views, config.eval.views_share),
        parallel=parallel,
        init_images=min(config.model.whiten_images, images) if is_whitened else 1,
        augment=augment.in_order(config.augment.to_dict(), classes),
        loss_fn=functools.partial(softmax_cross_entropy, smoothing=config.train.label_smoothing),
        tx=tx,
        steps=steps,
        patience=config.train.patience,
        stop_at_loss=config.train.stop_at_loss or None,
        eval_every=duration(config.eval, "every_", "eval", batch_size, images),
        batch_size=batch_size,
        micro_batches=config.train.micro_batches,
        eval_batch_size=min(config.eval.batch_size, len(dataset.test)),
        times_products=config.train.time_products,
        averages=config.optimizer.average != "none",
        precise_images=min(config.eval.precise_images, images) if _is_precise(config) else 0,
        shuffle=config.train.shuffle,
        most_skipped=config.train.most_skipped if config.train.on_nonfinite == "skip" else 0,
        save_every=save_every,
        save_every_minutes=saves.every_minutes or None,
        warnings=_warnings(config, steps),
    )


def dataset(config: ConfigDict) -> Dataset:
    """Returns the data set that `config.data` describes.

    Raises the same errors as `bnjax.data.datasets.load`.
    """
    data, reading = config.data, None
    if data.pipeline == "stream":
        reading = Reading(data.image_size, data.shorter_side, data.crop, data.workers)
    found = datasets.load(
        data.name,
        data.dir,
        fallback=data.fallback,
        label=data.label,
        train_images=data.train_images,
        stream=reading,
    )
    if data.classes:
        found = datasets.of_classes(found, data.classes)
    if not data.validation:
        return found
    # The fallback data set is smaller: hold out a tenth of it, like 5,000 of 50,000 images.
    images = len(found.train) // 10 if found.fallback_reason else data.validation
    return datasets.with_validation(found, images, data.validation_seed)


def stand_in(config: ConfigDict, dataset: Dataset, overrides: Sequence[str]) -> ConfigDict:
    """Returns the config adapted to a data set that replaces an unavailable one.

    Appends the name of the data set to the name of the run. Sets the batch size to a tenth of the
    training images, as in the tutorial, unless the command line (`overrides`) sets it.
    """
    if not dataset.fallback_reason:
        return config
    config = config.copy_and_resolve_references()
    config.name = f"{config.name}-{dataset.name}"
    if "train.batch_size" not in parsing.pairs(overrides):
        parts = config.train.micro_batches
        config.train.batch_size = len(dataset.train) // 10 // parts * parts
    return config


def spread_over(config: ConfigDict) -> Parallel:
    """Returns the devices that compute a step, in groups that share batch statistics.

    Raises:
        ConfigError: if there are too few devices, or they cannot form equal groups.
    """
    chosen = jax.config.values["jax_default_device"]  # also set by `jax.default_device`
    devices = [chosen] if chosen else jax.devices()
    processes = jax.process_count()
    count = config.devices or len(devices)
    if count > len(devices) or count % processes:
        of_each = f", with as many in each of {processes} processes" if processes > 1 else ""
        raise ConfigError("devices", count, f"up to {len(devices)}, the number of devices{of_each}")
    taken = [
        device
        for process in range(processes)
        for device in [one for one in devices if one.process_index == process or chosen][
            : count // processes
        ]
    ]
    over = config.model.statistics_over
    try:
        return spread(taken, int(over) if over.isdecimal() else over)
    except ValueError as error:
        allowed = f"global, per_device, or a number that divides the number of devices, {count}"
        raise ConfigError("model.statistics_over", over, allowed) from error


def duration(config: ConfigDict, prefix: str, section: str, batch_size: int, images: int) -> int:
    """Returns a duration in steps, at least 1; the config gives it in steps or in epochs.

    Args:
        config: has the keys `<prefix>steps` and `<prefix>epochs`, of which exactly one is not 0.
        prefix: the first part of the names of the keys, for instance "every_".
        section: the name of the section, for error messages.
        batch_size: the number of images per step; an epoch has images / batch_size steps, which
            may be fractional.
        images: the number of training images.

    Raises:
        ConfigError: if both keys or neither are given, or the number of steps exceeds an int32.

    >>> duration(ConfigDict({"steps": 0, "epochs": 2.0}), "", "train", 5000, 50_000)
    20
    """
    steps, epochs = config[f"{prefix}steps"], config[f"{prefix}epochs"]
    if (steps > 0) == (epochs > 0):
        raise ConfigError(
            f"{section}.{prefix}steps and .{prefix}epochs",
            (steps, epochs),
            "exactly one of the two above 0, and the other 0",
        )
    steps = steps or max(1, round(epochs * images / batch_size))
    if steps >= 1 << 31:
        raise ConfigError(
            f"{section}.{prefix}epochs", epochs, "fewer epochs: these are 2**31 steps or more"
        )
    return steps


def _is_precise(config: ConfigDict) -> bool:
    """Returns whether evaluation uses precise statistics; averaged weights always need them."""
    return config.eval.statistics == "precise" or config.optimizer.average != "none"


def _warnings(config: ConfigDict, steps: int) -> tuple[str, ...]:
    momentum = config.model.momentum
    left = momentum**steps
    is_batch = config.model.norm in norms.BATCH_NORMS
    starts_ready = config.train["from"] or config.train.freeze != "none"
    if not is_batch or starts_ready or config.model.debias or _is_precise(config) or left <= 0.01:
        return ()
    return (
        f"the running averages will not have converged. With config.model.momentum = {momentum:g}, "
        f"each step keeps {momentum:.0%} of the old average of means and variances. After {steps} "
        f"steps, the initial values (mean 0, variance 1) still have a weight of {left:.0%}. "
        "Training will look fine, but evaluation, which normalises with these averages, will look "
        f"bad. Train longer, or lower the momentum: {momentum_for(steps, 0.01):g} or less leaves "
        "at most 1%.",
    )
