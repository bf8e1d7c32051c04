"""How the keys of a config go together: what the table, which looks at each alone, cannot say.

Each check raises `ConfigError`, naming the key, the value and what is allowed.
"""

from collections.abc import Sequence

from ml_collections import ConfigDict

from bnjax import norms
from bnjax.data.datasets import RECORDS, Dataset
from bnjax.errors import ConfigError
from bnjax.train.model_keys import MODEL_KEYS


def batch(config: ConfigDict, dataset: Dataset) -> None:
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


def data(config: ConfigDict) -> None:
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


def network(config: ConfigDict) -> None:
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


def pixels(config: ConfigDict, image_shape: tuple[int, int, int]) -> None:
    """Checks that mean and std have an entry for each channel, or both none."""
    channels = image_shape[-1]
    for key in ("mean", "std"):
        if len(config[key]) != (channels if config.mean or config.std else 0):
            allowed = f"{channels} numbers, one for each channel, in mean and in std; or none"
            raise ConfigError(f"model.{key}", config[key], allowed)


def halvings(image_shape: tuple[int, int, int], groups: int) -> None:
    """Checks that a pixel is left where 1 is taken from the sides, and groups and a 3 divide."""
    least = 3 * 2**groups + 1
    if min(image_shape[:2]) < least:
        allowed = f"fewer groups: so many take images with sides of {least} pixels and above"
        raise ConfigError("model.filters", f"{groups} groups", allowed)


def lengths(config: ConfigDict) -> None:
    """Checks that there are as many entries of each kind as layers."""
    for of, keys in (("filters", ("kernels", "strides")), ("dense", ("dropout", "norm_dense"))):
        for key in keys:
            if len(config[key]) != len(config[of]):
                allowed = f"as many entries as config.model.{of}, which has {len(config[of])}"
                raise ConfigError(f"model.{key}", config[key], allowed)


def sides(config: ConfigDict, image_shape: tuple[int, int, int]) -> None:
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


def norm(config: ConfigDict) -> None:
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
