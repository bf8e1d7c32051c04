"""What a config describes: the network, the optimizer, the data and all else that a run needs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from optax import contrib

from bnjax import norms
from bnjax.clinic.averaging import weight_average
from bnjax.data import augment, datasets
from bnjax.data.augment import Augmentation
from bnjax.data.batches import Part
from bnjax.data.datasets import RECORDS, Dataset
from bnjax.data.records import Crop, Reading
from bnjax.errors import ConfigError
from bnjax.models.convnet import ACTIVATIONS, ConvNet
from bnjax.models.layers import bfloat16_dot_general, with_views
from bnjax.models.resnet import RESNETS
from bnjax.models.speednet import SpeedNet
from bnjax.train import parsing
from bnjax.train.config import MAX_SIZE, MODEL_KEYS, check_values, norm_options
from bnjax.train.devices import Parallel, spread
from bnjax.train_step import LossFn, softmax_cross_entropy
from bnjax.types import Leaf, Params


def check_batch(config: ConfigDict, dataset: Dataset) -> None:
    """Checks how batches go with images and norm, and that there is one interval of saving."""
    smallest = 2 if config.model.norm in norms.BATCH_NORMS else 1
    images = len(dataset.train)
    if not smallest <= config.train.batch_size <= images:
        allowed = f"{smallest} up to the {images} training images of {dataset.label}"
        raise ConfigError("train.batch_size", config.train.batch_size, allowed)
    size, parts = config.train.batch_size, config.train.micro_batches
    if size % parts or size // parts < smallest:
        allowed = f"a number that divides train.batch_size, {size}, into {smallest} images or more"
        raise ConfigError("train.micro_batches", parts, allowed)
    for key in ("histograms", "gap_images"):
        if 0 < config.eval[key] < smallest:
            allowed = f"a whole number, {smallest} or above, or 0 for none"
            raise ConfigError(f"eval.{key}", config.eval[key], allowed)
    given = {key: value for key, value in config.checkpoint.items() if value}
    if len(given) > 1:
        key, value = next(iter(given.items()))
        allowed = f"0 with the others as they are: at most one of {', '.join(given)} is above 0"
        raise ConfigError(f"checkpoint.{key}", value, allowed)


def check_data(config: ConfigDict) -> None:
    """Checks that what only streams have is asked of streams only, and how images are resized."""
    stream = config.pipeline == "stream"
    for key in ("image_size", "shorter_side", "random_crop", "workers"):
        if config[key] and not stream:
            allowed = f"{type(config[key])()} with data.pipeline = {config.pipeline!r}"
            raise ConfigError(f"data.{key}", config[key], allowed)
    if config.name == RECORDS and not stream:
        raise ConfigError(
            "data.pipeline", config.pipeline, f"'stream' with data.name = {RECORDS!r}"
        )
    if config.shorter_side and config.shorter_side < max(config.image_size, 1):
        allowed = f"config.data.image_size, {config.image_size}, or above; or 0 for as much"
        raise ConfigError("data.shorter_side", config.shorter_side, allowed)
    for key in ("shorter_side", "random_crop"):
        if config[key] and not config.image_size:
            allowed = f"{type(config[key])()} with data.image_size = 0"
            raise ConfigError(f"data.{key}", config[key], allowed)


# The keys of `model` that only some networks have; all others are for every one.
OWN_KEYS = {
    "convnet": (
        "filters kernels strides pooling dense dropout norm_dense placement dense_product "
        "weight_standardization"
    ),
    "speednet": "filters whiten_images mean std",
    "resnet": "placement weight_standardization mean std",
}


def check_network(config: ConfigDict) -> None:
    """Checks that only keys which the network has are changed, and that the norm can stand in it.

    `config` is the section `model`.
    """
    kind = "resnet" if config.name.startswith("resnet") else config.name
    own = OWN_KEYS[kind].split()
    defaults = {key.name.removeprefix("model."): key.default for key in MODEL_KEYS}
    for key in sorted({*" ".join(OWN_KEYS.values()).split()} - {*own}):
        if config[key] != defaults[key]:
            allowed = f"{defaults[key]!r}: model.name = {config.name!r} does not have this key"
            raise ConfigError(f"model.{key}", config[key], allowed)
    if kind != "convnet" and config.norm == "frn":
        raise ConfigError("model.norm", config.norm, "another norm with this model.name")
    if kind == "resnet" and config.placement == "after":
        raise ConfigError("model.placement", config.placement, "input or before in a ResNet")
    if kind != "convnet":
        first = 16 if config.name == "resnet20" else 64  # the others are multiples
        _groups(config, config.filters if kind == "speednet" else (first,))


def check_pixels(config: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Checks that mean and std have an entry for each channel, or both none."""
    channels = image_shape[-1]
    for key in ("mean", "std"):
        if len(config[key]) != (channels if config.mean or config.std else 0):
            allowed = f"{channels} numbers, one for each channel, in mean and in std; or none"
            raise ConfigError(f"model.{key}", config[key], allowed)


def check_halvings(image_shape: tuple[int, int, int], groups: int) -> None:
    """Checks that a pixel is left where 1 is taken from the sides, and groups and a 3 divide."""
    least = 3 * 2**groups + 1
    if min(image_shape[:2]) < least:
        allowed = f"fewer groups: so many take images with sides of {least} pixels and above"
        raise ConfigError("model.filters", f"{groups} groups", allowed)


def check_lengths(config: ConfigDict) -> None:
    """Checks that there are as many entries of each kind as layers."""
    for of, keys in (("filters", ("kernels", "strides")), ("dense", ("dropout", "norm_dense"))):
        for key in keys:
            if len(config[key]) != len(config[of]):
                allowed = f"as many entries as config.model.{of}, which has {len(config[of])}"
                raise ConfigError(f"model.{key}", config[key], allowed)


def check_sides(config: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Checks that the convolutions leave a pixel of the images."""
    for side in image_shape[:2]:
        for i, (kernel, stride) in enumerate(zip(config.kernels, config.strides, strict=True)):
            pooled = config.pooling != "none"
            after = (side - kernel + 1) // stride if pooled else (side - kernel) // stride + 1
            if side < kernel or after < 1:
                raise ConfigError(
                    "model.kernels and .strides",
                    (tuple(config.kernels), tuple(config.strides)),
                    "layers that leave at least one pixel; image sides of "
                    f"{image_shape[0]}x{image_shape[1]} are {side} at layer {i}",
                )
            side = after


def check_norm(config: ConfigDict) -> None:
    """Checks that the norm can work where it stands."""
    norm = f"model.norm = {config.norm!r}"
    normed = zip(config.dense, config.norm_dense, strict=True)
    widths = (*config.filters, *(width for width, is_normed in normed if is_normed))
    if config.norm in norms.POSITION_NORMS and any(config.norm_dense):
        allowed = f"False for every layer with {norm}, which normalises images and not vectors"
        raise ConfigError("model.norm_dense", config.norm_dense, allowed)
    if config.norm == "frn" and config.placement != "before":
        allowed = f"'before' with {norm}, which brings the activation after it"
        raise ConfigError("model.placement", config.placement, allowed)
    if config.norm in ("instance", "group") and config.placement == "input":
        allowed = (
            f"'before' or 'after' with {norm}, whose statistics the input of a layer may be too "
            "small for"
        )
        raise ConfigError("model.placement", config.placement, allowed)
    _groups(config, widths)


def _groups(config: ConfigDict, widths: Sequence[int]) -> None:
    if config.norm == "group" and any(width % config.groups for width in widths):
        allowed = f"a number that divides the channels of every normalised layer: {tuple(widths)}"
        raise ConfigError("model.groups", config.groups, allowed)


def network(
    config: ConfigDict, classes: int, image_shape: tuple[int, int, int], **norm_axes: str
) -> nn.Module:
    """Returns the network that `config.model` describes for images [h, w, c].

    Args:
        config: the section `model`.
        classes: the number of logits.
        image_shape: of one image.
        norm_axes: the mapped axes of the batch norms, for training in parts.

    Raises:
        ConfigError: for an impossible value, or if the images shrink to nothing.
    """
    check_values(config, "model")
    check_network(config)
    check_pixels(config, image_shape)
    shared: dict[str, Any] = {
        "classes": classes,
        "norm": norms.build(config.norm, **norm_options(config), **norm_axes),
        "activation": ACTIVATIONS[config.activation],
        "dtype": jnp.dtype(dtype_of(config)),
    }
    if config.name == "convnet":
        return _convnet(config, image_shape, shared)
    shared |= {"mean": tuple(config.mean), "std": tuple(config.std)}
    if config.name == "speednet":
        check_halvings(image_shape, len(config.filters))
        return SpeedNet(widths=config.filters, **shared)
    return RESNETS[config.name](
        placement="pre" if config.placement == "input" else "post", conv=_conv(config), **shared
    )


def dtype_of(config: ConfigDict) -> str:
    """Returns the dtype of the arithmetic; `config` is the section `model`."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def augmentation(config: ConfigDict, classes: int) -> augment.Augmentation | None:
    """Returns what is done to a batch of training; None for nothing.

    Args:
        config: the section `augment`.
        classes: how many there are.
    """
    flips = {"random": augment.flip, "alternating": augment.alternating_flip}
    made: dict[str, Callable[[Any], augment.Augmentation]] = {
        "flip": flips.__getitem__,
        "translate": augment.translate,
        "crop": augment.crop,
        "brightness": augment.brightness,
        "contrast": augment.contrast,
        "cutout": augment.cutout,
        "mixup": functools.partial(augment.mixup, classes=classes),
    }
    chosen = [make(config[key]) for key, make in made.items() if config[key] not in (0, "none")]
    return augment.chain(chosen) if chosen else None


def _convnet(
    config: ConfigDict, image_shape: tuple[int, int, int], shared: dict[str, Any]
) -> ConvNet:
    check_lengths(config)
    check_norm(config)
    check_sides(config, image_shape)
    if config.dense_product != "float32" and config.dtype != "float32":
        raise ConfigError(
            "model.dense_product",
            config.dense_product,
            f"float32 with model.dtype = {config.dtype!r}, whose products have such operands "
            "already",
        )
    return ConvNet(
        filters=config.filters,
        kernels=config.kernels,
        strides=config.strides,
        pooling=config.pooling,
        dense=config.dense,
        dropout=tuple(float(rate) for rate in config.dropout),
        norm_activation=norms.ThresholdedLinear if config.norm == "frn" else None,
        conv=_conv(config),
        norm_dense=config.norm_dense,
        placement=config.placement,
        dense_product=bfloat16_dot_general if config.dense_product == "bfloat16" else None,
        **shared,
    )


def _conv(config: ConfigDict) -> Callable[..., nn.Module]:
    return norms.StandardizedConv if config.weight_standardization else nn.Conv


# Three of its steps, with these coefficients, bring singular values near 1 (K. Jordan, 2024).
NEWTON_SCHULZ = {"ns_coeffs": (3.4576, -4.7391, 2.0843), "ns_steps": 3}


def optimizer(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    """Returns the optimizer that a config describes, for the gradient of the mean loss.

    Args:
        config: a whole one.
        steps: of the run, which the rate's schedule is for.

    Raises:
        ConfigError: for an impossible value.
    """
    for section in ("optimizer", "muon"):
        check_values(config[section], section)
    options = config.optimizer
    rate = schedule(options, options.learning_rate, steps)
    decayed = None if options.decay == "all" else kernels
    if options.name == "muon":
        tx = _muon(config, rate, steps)
    elif options.name == "sgd":
        tx = _sgd(rate, options.momentum, options.nesterov, options.weight_decay, decayed)
    else:
        betas = {"b1": options.b1, "b2": options.b2, "eps": options.eps}
        tx = optax.adam(rate, **betas)
        if options.weight_decay:
            tx = optax.adamw(rate, **betas, weight_decay=options.weight_decay, mask=decayed)
    if options.loss == "sum":
        tx = optax.chain(optax.scale(config.train.batch_size), tx)
    if options.average == "none":
        return tx
    return weight_average(
        tx,
        kind=options.average,
        decay=options.average_decay,
        start=options.average_start,
        every=options.average_every,
    )


def schedule(options: ConfigDict, peak: float, steps: int) -> Any:
    """Returns the rate of each of so many steps: a number, or a function of the step.

    Args:
        options: the section `optimizer`.
        peak: the highest rate.
        steps: after which a rate that falls is 0.

    >>> from bnjax.train.config import default_config
    >>> options = default_config().optimizer
    >>> options.schedule, options.warmup = "linear", 0.5
    >>> [round(float(schedule(options, 8.0, 8)(step)), 3) for step in (0, 2, 4, 6, 8)]
    [0.0, 4.0, 8.0, 4.0, 0.0]
    """
    rising = round(options.warmup * steps)
    falling = max(steps - rising, 1)
    if options.schedule == "one_cycle":  # its divisors are those of Smith & Topin, 2018, as torch's
        return optax.cosine_onecycle_schedule(steps, peak, options.warmup or 0.3, 25.0, 1e4)
    if options.schedule == "linear":
        rate: Any = optax.linear_schedule(peak, 0.0, falling)
    elif options.schedule == "cosine":
        rate = optax.cosine_decay_schedule(peak, falling)
    else:
        rate = peak
    if not rising:
        return rate
    up = optax.linear_schedule(0.0, peak, rising)
    down = rate if callable(rate) else optax.constant_schedule(rate)
    return optax.join_schedules([up, down], [rising])


def kernels(params: Params) -> Any:
    """Returns True for the kernels that are trained by gradients, as a mask for Optax has it."""
    return jax.tree.map(lambda kind: kind in ("convolution", "dense"), kinds(params))


def kinds(params: Params) -> Any:
    """Returns for each leaf what it is, as Muon tells them apart.

    "convolution" and "dense" are kernels, "fixed" and "whitening" kernel and bias of a
    `bnjax.models.speednet.Whitening`; all else is "other".
    """

    def kind(path: Any, leaf: Any) -> str:
        *_, parent, name = ["", *(str(getattr(key, "key", key)) for key in path)]
        if parent == "whiten":
            return "fixed" if name == "kernel" else "whitening"
        if name != "kernel":
            return "other"
        return "convolution" if jnp.ndim(leaf) > 2 else "dense"

    return jax.tree_util.tree_map_with_path(kind, params)


def _sgd(
    rate: Any, momentum: float, nesterov: bool, decay: float, decayed: Any
) -> optax.GradientTransformation:
    tx = optax.sgd(rate, momentum=momentum or None, nesterov=nesterov)
    return optax.chain(optax.add_decayed_weights(decay, decayed), tx) if decay else tx


def _muon(config: ConfigDict, rate: Any, steps: int) -> optax.GradientTransformation:
    """Returns Muon for the kernels of convolutions, and SGD with rates of its own for the rest.

    Optax's part makes the step orthogonal. What it lacks is that kernels stand on a sphere, which
    is ours, and SGD beside it: `optax.contrib.muon` has AdamW there.
    """
    options, muon = config.optimizer, config.muon
    every, more = muon.rescale_every
    all_decay = options.decay == "all"

    def sgd(peak: float, steps: int, *, decays: bool) -> optax.GradientTransformation:
        decay = options.weight_decay / peak if decays else 0.0  # per step, whatever the rate
        falling = schedule(options, peak, steps)
        return _sgd(falling, muon.momentum, True, decay, None)

    def as_matrix(params: Params) -> Any:
        return jax.tree.map(
            lambda leaf: contrib.MuonDimensionNumbers(tuple(range(leaf.ndim - 1)), leaf.ndim - 1),
            params,
        )

    return optax.partition(
        {
            "convolution": optax.chain(
                contrib.scale_by_muon(
                    beta=options.momentum,
                    nesterov=True,
                    weight_dimension_numbers=as_matrix,
                    **NEWTON_SCHULZ,
                ),
                optax.scale_by_learning_rate(rate),
                rescale(every, more, steps),
            ),
            "dense": sgd(muon.head_rate, steps, decays=True),
            "whitening": sgd(muon.bias_rate, muon.whiten_steps or steps, decays=all_decay),
            "fixed": optax.set_to_zero(),
            "other": sgd(muon.bias_rate, steps, decays=all_decay),
        },
        kinds,
    )


class RescaleState(NamedTuple):
    """How many updates there were, int32 []."""

    updates: Leaf


def rescale(every: int, more: int, steps: int) -> optax.GradientTransformation:
    """Returns what brings kernels to the norm sqrt(output channels) before an update is added.

    A kernel in front of a norm has no scale of its own, and its rate is its step beside its norm:
    so the schedule alone decides on it. To be the last of a chain.

    Args:
        every, more: it is done each `every + int(more * progress)` updates.
        steps: how many updates there are in all.
    """

    def init(params: Params) -> RescaleState:
        del params
        return RescaleState(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: RescaleState, params: Any = None) -> tuple[Any, RescaleState]:
        interval = every + (more * state.updates / steps).astype(jnp.int32)
        is_due = state.updates % interval == 0

        def moved(update: jax.Array, kernel: jax.Array) -> jax.Array:
            norm = jnp.maximum(jnp.linalg.norm(kernel), jnp.finfo(kernel.dtype).tiny)
            onto = kernel * (jnp.sqrt(kernel.shape[-1]) / norm) - kernel
            return update + jnp.where(is_due, onto, 0)

        return jax.tree.map(moved, updates, params), RescaleState(state.updates + 1)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config means for a data set: everything that the loop needs, durations in steps."""

    model: nn.Module
    training_model: nn.Module  # the same, its batch norms bound to the axes of `parallel`
    tested_model: nn.Module  # the same, over several views of each image
    parallel: Parallel
    init_images: int  # training images that the network is initialised with
    augment: Augmentation | None  # of the batches of training
    loss_fn: LossFn  # of training
    tx: optax.GradientTransformation
    steps: int
    stop_at_loss: float | None  # training ends when the loss of a step first is at or below it
    eval_every: int
    batch_size: int
    micro_batches: int  # that are gone through one after another
    eval_batch_size: int
    product: str  # the dtype of what the dense layers multiply
    averages: bool  # averaged weights are evaluated
    precise_images: int  # training images of the statistics of evaluation; 0: the running ones
    gap_images: int  # training images
    histograms: int  # training images
    pictures: int  # test images
    shuffle: bool
    most_skipped: int  # steps in a row that may be dropped because they are not finite
    save_every: int | None  # steps, beside the evaluations
    save_every_minutes: float | None
    warnings: tuple[str, ...]

    @property
    def part(self) -> Part:
        """The rows of each batch that this process loads; every device can divide its own up."""
        part, devices = self.parallel.part, self.parallel.mesh.size
        multiple = devices * self.micro_batches if devices > 1 else 1  # one has all of the batch
        return dataclasses.replace(part, multiple=multiple)

    @property
    def is_apart(self) -> bool:
        """Whether other weights or statistics are evaluated than training has."""
        return self.precise_images > 0


def experiment(config: ConfigDict, dataset: Dataset) -> Experiment:
    """Returns what to train and for how long, after checking every value; nothing is compiled.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    check_values(config)
    check_batch(config, dataset)
    low_precision = "bfloat16" in (dtype_of(config.model), config.model.dense_product)
    images, batch_size, saves = len(dataset.train), config.train.batch_size, config.checkpoint
    steps = duration(config.train, "", "train", batch_size, images)
    save_every = None
    if saves.every_steps or saves.every_epochs:
        save_every = duration(saves, "every_", "checkpoint", batch_size, images)
    parallel = spread_over(config)
    classes = len(dataset.classes)
    model = functools.partial(network, config.model, classes, dataset.train.image_shape)
    is_whitened = config.model.name == "speednet"
    return Experiment(
        model=model(),
        training_model=model(**parallel.norm_axes),
        tested_model=with_views(model(), config.eval.views, config.eval.views_share),
        parallel=parallel,
        init_images=min(config.model.whiten_images, images) if is_whitened else 1,
        augment=augmentation(config.augment, classes),
        loss_fn=functools.partial(softmax_cross_entropy, smoothing=config.train.label_smoothing),
        tx=optimizer(config, steps),
        steps=steps,
        stop_at_loss=config.train.stop_at_loss or None,
        eval_every=duration(config.eval, "every_", "eval", batch_size, images),
        batch_size=batch_size,
        micro_batches=config.train.micro_batches,
        eval_batch_size=min(config.eval.batch_size, len(dataset.test)),
        product="bfloat16" if low_precision else "float32",
        averages=config.optimizer.average != "none",
        precise_images=min(config.eval.precise_images, images) if _is_precise(config) else 0,
        gap_images=min(config.eval.gap_images, images),
        histograms=min(config.eval.histograms, images),
        pictures=min(config.eval.pictures, len(dataset.test)),
        shuffle=config.train.shuffle,
        most_skipped=config.train.most_skipped if config.train.on_nonfinite == "skip" else 0,
        save_every=save_every,
        save_every_minutes=saves.every_minutes or None,
        warnings=_warnings(config, steps),
    )


def dataset(config: ConfigDict) -> Dataset:
    """Returns the data set that `config.data` describes; errors as `bnjax.data.datasets.load`."""
    data, reading = config.data, None
    check_data(data)
    if data.pipeline == "stream":
        side = data.image_size
        crop = Crop(side, data.shorter_side or side, data.random_crop) if side else None
        reading = Reading(crop, data.workers)
    return datasets.load(
        data.name,
        data.dir,
        fallback=data.fallback,
        label=data.label,
        train_images=data.train_images,
        stream=reading,
    )


def stand_in(config: ConfigDict, dataset: Dataset, overrides: list[str]) -> ConfigDict:
    """Returns the config as it is used if the data set stands in for the one that was asked for.

    The run is named after the data set, and a batch is a tenth of its training images, the
    tutorial's ratio, unless the words of the command line, `overrides`, give a size.
    """
    if not dataset.fallback_reason:
        return config
    config = config.copy_and_resolve_references()
    config.name = f"{config.name}-{dataset.name}"
    if "train.batch_size" not in dict(parsing.pairs(overrides)):
        parts = config.train.micro_batches
        config.train.batch_size = len(dataset.train) // 10 // parts * parts
    return config


def check(config: ConfigDict) -> None:
    """Checks what needs no data, so that a mistake shows before anything is downloaded.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    check_values(config)
    check_data(config.data)
    channels = len(config.model.mean) or 3  # what the images have is not known yet
    network(config.model, classes=10, image_shape=(MAX_SIZE, MAX_SIZE, channels))


def spread_over(config: ConfigDict) -> Parallel:
    """Returns how a step is spread over the devices that are here.

    Raises:
        ConfigError: if there are not so many, or they make no whole groups.
    """
    chosen = jax.config.values["jax_default_device"]  # as under `jax.default_device`
    devices = [chosen] if chosen else jax.devices()
    processes = jax.process_count()
    count = config.devices or len(devices)
    if count > len(devices) or count % processes:
        of_each = f", of each of {processes} processes as many" if processes > 1 else ""
        raise ConfigError("devices", count, f"up to {len(devices)}, which there are{of_each}")
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
        allowed = f"global, per_device, or a number that divides that of the devices, {count}"
        raise ConfigError("model.statistics_over", over, allowed) from error


def duration(config: ConfigDict, prefix: str, section: str, batch_size: int, images: int) -> int:
    """Returns a duration in steps, at least 1; `config` holds it as steps or as epochs.

    Args:
        config: has the keys `<prefix>steps` and `<prefix>epochs`, exactly one of them not 0.
        prefix: see above.
        section: of the config, for errors.
        batch_size: an epoch is images / batch_size steps and need not be whole.
        images: in the training set.

    Raises:
        ConfigError: if both or neither are given, or they are too many steps for an int32.

    >>> duration(ConfigDict({"steps": 0, "epochs": 2.0}), "", "train", 5000, 50_000)
    20
    """
    steps, epochs = config[f"{prefix}steps"], config[f"{prefix}epochs"]
    if (steps > 0) == (epochs > 0):
        raise ConfigError(
            f"{section}.{prefix}steps and .{prefix}epochs",
            (steps, epochs),
            "exactly one of the two above 0; the other has to be 0: for instance "
            f"--config.{section}.{prefix}steps=100 --config.{section}.{prefix}epochs=0",
        )
    steps = steps or max(1, round(epochs * images / batch_size))
    if steps >= 1 << 31:
        raise ConfigError(
            f"{section}.{prefix}epochs", epochs, "so many that they make fewer than 2**31 steps"
        )
    return steps


def _is_precise(config: ConfigDict) -> bool:
    """Returns whether evaluation has statistics of its own, as averaged weights always do."""
    return config.eval.statistics == "precise" or config.optimizer.average != "none"


def _warnings(config: ConfigDict, steps: int) -> tuple[str, ...]:
    momentum = config.model.momentum
    left = momentum**steps
    is_batch = config.model.norm in norms.BATCH_NORMS
    if not is_batch or config.model.debias or _is_precise(config) or left <= 0.01:
        return ()
    return (
        f"the running averages will not be ready. With config.model.momentum = {momentum:g} each "
        f"step keeps {momentum:.0%} of the old average of means and variances, so after {steps} "
        f"steps {left:.0%} of what evaluation uses is still the made-up starting value (mean 0, "
        "variance 1), not your data. Training will look fine and test results will look bad. Train "
        f"longer, or lower the momentum: {0.01 ** (1 / steps):.2f} or less leaves at most 1%.",
    )
