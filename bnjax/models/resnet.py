"""Residual networks (He et al., 2016) for CIFAR and ImageNet, with any norm layer."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from bnjax.models.layers import NormFactory, normalised, standardised_pixels
from bnjax.types import Array, Images, Logits, Mask

Stem = Literal["cifar", "imagenet"]
Shortcut = Literal["projection", "padding"]
Order = Literal["pre", "before"]

HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al., 2015
# Maps the names of layers in bnjax to those in torchvision. The first matching row applies.
TORCHVISION: Mapping[str, str] = {
    "stem": "conv1",
    "stem_norm": "bn1",
    "stage{s}_block{b}.conv{i}_norm": "layer{s}.{b}.bn{i}",
    "stage{s}_block{b}.conv{i}": "layer{s}.{b}.conv{i}",
    "stage{s}_block{b}.shortcut_norm": "layer{s}.{b}.downsample.1",
    "stage{s}_block{b}.shortcut": "layer{s}.{b}.downsample.0",
    "logits": "fc",
}


class _Layers(nn.Module):
    """The fields shared by the network and its blocks; `ResNet` documents them."""

    norm: NormFactory | None = None
    shortcut: Shortcut = "projection"
    placement: Order = "before"
    zero_last: bool = True
    bottleneck: bool = False
    activation: Callable[[Array], Array] = nn.relu
    conv: Callable[..., nn.Module] = nn.Conv
    dtype: Any = None

    def _convolve(self, x: Array, width: int, side: int, stride: int, name: str) -> Array:
        """Convolves after padding each side with zeros (half the kernel size), as in torch."""
        padding = ((side // 2, side // 2),) * 2
        is_zero = self.zero_last and self.placement == "pre" and name == self._last
        layer = self.conv(
            features=width,
            kernel_size=(side, side),
            strides=(stride, stride),
            padding=padding,
            use_bias=False,
            kernel_init=nn.initializers.zeros if is_zero else HE,
            dtype=self.dtype,
            name=name,
        )
        return layer(x)

    def _normalise(self, x: Array, train: bool, mask: Array | None, name: str) -> Array:
        is_zero = self.zero_last and self.placement == "before" and name == f"{self._last}_norm"
        takes = is_zero and self.norm and "scale_init" in inspect.signature(self.norm).parameters
        options = {"scale_init": nn.initializers.zeros} if takes else {}
        return normalised(self.norm, x, train=train, mask=mask, name=name, **options)

    @property
    def _last(self) -> str:
        """The name of the last convolution of a block."""
        return "conv3" if self.bottleneck else "conv2"


class Block(_Layers):
    """A residual block of two or three convolutions and a shortcut.

    Attributes:
        width: the number of channels of the first convolution; the output of a bottleneck has four
            times as many.
        stride: the stride of the first 3x3 convolution and of the shortcut.
    """

    width: int = 64
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array, *, train: bool, mask: Array | None = None) -> Array:
        """Returns the output [n, h / stride, w / stride, c]; `mask` is False for padding."""
        is_pre = self.placement == "pre"
        normalise = functools.partial(self._normalise, train=train, mask=mask)
        layers = [(self.width, 3, self.stride), (self.width, 3, 1)]
        if self.bottleneck:  # as in torchvision, the 3x3 convolution is strided
            layers = [(self.width, 1, 1), (self.width, 3, self.stride), (4 * self.width, 1, 1)]
        short = x
        changes = self.stride > 1 or x.shape[-1] != layers[-1][0]
        for i, (width, side, stride) in enumerate(layers, 1):
            if is_pre:
                x = self.activation(normalise(x, name=f"conv{i}_norm"))
                if i == 1 and changes and self.shortcut == "projection":
                    short = x
            x = self._convolve(x, width, side, stride, f"conv{i}")
            if not is_pre:
                x = normalise(x, name=f"conv{i}_norm")
                x = x if i == len(layers) else self.activation(x)
        if changes and self.shortcut == "projection":
            short = self._convolve(short, x.shape[-1], 1, self.stride, "shortcut")
            short = short if is_pre else normalise(short, name="shortcut_norm")
        elif changes:
            short = short[:, :: self.stride, :: self.stride]
            short = jnp.pad(short, ((0, 0),) * 3 + ((0, x.shape[-1] - short.shape[-1]),))
        x = x + short
        return x if is_pre else self.activation(x)


class ResNet(_Layers):
    """A residual network of basic or bottleneck blocks, for images of any size.

    The defaults give ResNet-18 for CIFAR; `RESNETS` lists other networks. Each stage after the
    first halves the height and width and doubles the number of channels. Convolutions have no bias,
    and are padded as in torch.

    Attributes:
        norm: a factory for norm layers, as for `ConvNet`; for the last norm of a block,
            `scale_init` is passed to the factory if it accepts this argument. None for no norm.
        shortcut: the shortcut in blocks that change the shape. "projection" is a 1x1 convolution
            with a norm; "padding" takes every second pixel and adds channels of zeros (option A of
            the paper, used for its CIFAR networks).
        placement: the order in a block. "before" is convolution, norm, activation, with the last
            activation after the sum; "pre" is norm, activation, convolution (He et al., 2016,
            "Identity mappings").
        zero_last: whether each block initially returns its shortcut (Goyal et al., 2017): the scale
            of its last norm (for "pre", the kernel of its last convolution) is initialised to 0.
        bottleneck: whether a block has 1x1, 3x3 and 1x1 convolutions, instead of two 3x3
            convolutions; the last convolution of a bottleneck has four times the width.
        activation: a function of an array.
        conv: a factory for convolutions, called like `flax.linen.Conv`.
        dtype: the dtype of convolutions and logits; None for the dtype of the input. Parameters are
            float32.
        stages: the number of blocks in each stage.
        width: the number of channels of the first stage.
        classes: the number of logits.
        stem: the first layers: "cifar" for a 3x3 convolution, "imagenet" for a 7x7 convolution with
            stride 2 and a 3x3 max-pool.
        mean, std: the mean and standard deviation of the pixels of each channel, with which images
            are standardised; empty for no standardisation.
    """

    stages: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    classes: int = 10
    stem: Stem = "cifar"
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    @nn.compact
    def __call__(self, x: Images, *, train: bool, mask: Mask | None = None) -> Logits:
        """Returns the logits [n, classes] of images [n, h, w, c]; `mask` is False for padding."""
        x = standardised_pixels(x, self.mean, self.std)
        normalise = functools.partial(self._normalise, train=train, mask=mask)
        is_pre = self.placement == "pre"
        side, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = self._convolve(x, self.width, side, stride, "stem")
        x = x if is_pre else self.activation(normalise(x, name="stem_norm"))
        if self.stem == "imagenet":
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        names = {field.name for field in dataclasses.fields(_Layers)} - {"name", "parent"}
        shared = {name: getattr(self, name) for name in names}
        for stage, blocks in enumerate(self.stages):
            for i in range(blocks):
                block = Block(
                    width=self.width << stage,
                    stride=2 if stage > 0 and i == 0 else 1,
                    name=f"stage{stage + 1}_block{i}",
                    **shared,
                )
                x = block(x, train=train, mask=mask)
        x = self.activation(normalise(x, name="last_norm")) if is_pre else x
        x = nn.Dense(self.classes, dtype=self.dtype, name="logits")(x.mean((1, 2)))
        return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Residual networks, keyed by name. Each accepts the remaining fields of `ResNet` as arguments.
RESNETS: Mapping[str, Callable[..., ResNet]] = {
    "resnet20": functools.partial(ResNet, stages=(3, 3, 3), width=16, shortcut="padding"),
    "resnet18": functools.partial(ResNet, stages=(2, 2, 2, 2), width=64),
    "resnet50": functools.partial(
        ResNet, stages=(3, 4, 6, 3), width=64, bottleneck=True, stem="imagenet"
    ),
}
