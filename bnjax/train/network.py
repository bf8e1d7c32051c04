"""The network that a config describes, and what is done to its images in training."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bnjax import norms
from bnjax.data import augment
from bnjax.errors import ConfigError
from bnjax.models.convnet import ACTIVATIONS, ConvNet
from bnjax.models.layers import bfloat16_dot_general
from bnjax.models.resnet import RESNETS
from bnjax.models.speednet import SpeedNet
from bnjax.train import checks
from bnjax.train.config import check_values, norm_options


def model(
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
    checks.network(config)
    checks.pixels(config, image_shape)
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
        checks.halvings(image_shape, len(config.filters))
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
    checks.lengths(config)
    checks.norm(config)
    checks.sides(config, image_shape)
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
