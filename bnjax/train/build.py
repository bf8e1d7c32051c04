"""What a config describes, checked and built."""

import dataclasses
import functools

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from bnjax import norms
from bnjax.data import datasets
from bnjax.data.augment import Augmentation
from bnjax.data.batches import Part
from bnjax.data.datasets import Dataset
from bnjax.data.records import Crop, Reading
from bnjax.errors import ConfigError
from bnjax.models.layers import with_views
from bnjax.train import checks, network, parsing
from bnjax.train.allowed import MAX_SIZE
from bnjax.train.config import check_values
from bnjax.train.devices import Parallel, spread
from bnjax.train.optimizer import optimizer
from bnjax.train_step import LossFn, softmax_cross_entropy


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
    checks.batch(config, dataset)
    low_precision = "bfloat16" in (network.dtype_of(config.model), config.model.dense_product)
    images, batch_size, saves = len(dataset.train), config.train.batch_size, config.checkpoint
    steps = duration(config.train, "", "train", batch_size, images)
    save_every = None
    if saves.every_steps or saves.every_epochs:
        save_every = duration(saves, "every_", "checkpoint", batch_size, images)
    parallel = spread_over(config)
    classes = len(dataset.classes)
    model = functools.partial(network.model, config.model, classes, dataset.train.image_shape)
    is_whitened = config.model.name == "speednet"
    return Experiment(
        model=model(),
        training_model=model(**parallel.norm_axes),
        tested_model=with_views(model(), config.eval.views, config.eval.views_share),
        parallel=parallel,
        init_images=min(config.model.whiten_images, images) if is_whitened else 1,
        augment=network.augmentation(config.augment, classes),
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
    checks.data(data)
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
    checks.data(config.data)
    channels = len(config.model.mean) or 3  # what the images have is not known yet
    network.model(config.model, classes=10, image_shape=(MAX_SIZE, MAX_SIZE, channels))


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
