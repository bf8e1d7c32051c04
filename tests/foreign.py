"""Networks as other people write them, for what has to work on any linen model.

None of the networks knows of bnjax. `x` is float [n, h, w, c]; logits [n, 10].
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bnjax.train_step import init_variables


class BasicBlock(nn.Module):
    """He et al., 2016a, figure 2, with a projection where the shape changes."""

    filters: int
    strides: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        y = nn.relu(self.norm()(self.conv(self.filters, (3, 3), (self.strides,) * 2)(x)))
        y = self.norm(scale_init=nn.initializers.constant(0.5))(self.conv(self.filters, (3, 3))(y))
        if x.shape != y.shape:
            x = self.conv(self.filters, (1, 1), (self.strides,) * 2, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


def _torch_conv(filters, kernel, strides=1, **options):
    """A convolution that pads as torch does: both sides alike, by half the kernel."""
    padding = [(side // 2, side // 2) for side in kernel]
    return nn.Conv(filters, kernel, strides, padding, use_bias=False, **options)


class ResNet(nn.Module):
    """A residual network of basic blocks; (2, 2, 2, 2) and 64 make it ResNet-18.

    With `torchvision` its stem is that for ImageNet, and it pads as torch does.
    """

    stages: Sequence[int] = (2, 2, 2, 2)
    width: int = 64
    classes: int = 10
    torchvision: bool = False

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = _torch_conv if self.torchvision else functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        stem, stride = ((7, 7), (2, 2)) if self.torchvision else ((3, 3), (1, 1))
        x = nn.relu(norm(name="norm_init")(conv(self.width, stem, stride, name="conv_init")(x)))
        if self.torchvision:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                strides = 2 if i > 0 and j == 0 else 1
                x = BasicBlock(self.width * 2**i, strides, conv, norm)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class PreActResNet(nn.Module):
    """Norm, ReLU, convolution (He et al., 2016b); the last norm is followed by the mean."""

    blocks: int = 2
    width: int = 8

    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        for _ in range(self.blocks):
            y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm()(x)))
            y = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm()(y)))
            x = x + y
        return nn.Dense(10)(nn.relu(norm(name="last")(x)).mean((1, 2)))


class Layer(nn.Module):
    """What lifted transformations repeat: a dense layer, a norm, a ReLU."""

    width: int
    train: bool

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(self.width)(x)
        x = nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x)
        return nn.relu(x), None


LIFTED = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}


class Lifted(nn.Module):
    """Layers under `nn.scan`, `nn.remat` or `nn.vmap`, or one ("shared") that is called twice.

    Under scan and vmap, parameters and statistics have an axis for the layers. Dense layers at both
    ends change the widths, except with `alone`.
    """

    how: str
    width: int = 12
    alone: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        x = x.reshape(len(x), -1)
        if self.how in ("scan", "shared") and not self.alone:
            x = nn.Dense(self.width)(x)
        if self.how == "remat":
            for i in range(2):
                x, _ = nn.remat(Layer)(self.width, train, name=f"layer{i}")(x)
        elif self.how == "vmap":
            heads = nn.vmap(Layer, **LIFTED, in_axes=None, axis_size=3)
            x = heads(self.width, train, name="heads")(x)[0].mean(0)
        elif self.how == "scan":
            x, _ = nn.scan(Layer, **LIFTED, length=3)(self.width, train, name="layers")(x, None)
        else:
            layer = Layer(self.width, train)
            x, _ = layer(layer(x)[0])
        return x if self.alone else nn.Dense(10)(x)


NETWORKS = {
    "resnet": ResNet((1, 1), 4),
    "preact": PreActResNet(),
    "scan": Lifted("scan"),
    "remat": Lifted("remat"),
    "vmap": Lifted("vmap", 6),
    "shared": Lifted("shared"),
}


def shapes(model, images):
    return jax.eval_shape(functools.partial(init_variables, model), jax.random.key(0), images)


def drawn(model, images, positive=False):
    """Parameters and statistics as of a trained network: no scale of 1, no mean of 0.

    The scales have both signs unless they are to be `positive`. Nothing is compiled.
    """
    rng = np.random.default_rng(1)

    def leaf(path, like):
        name = path[-1].key
        if name == "kernel":
            return rng.normal(0, like.size**-0.5, like.shape).astype(like.dtype)
        low = {"var": 0.3, "scale": 0.3 if positive else -1.0}.get(name, -1.0)
        return rng.uniform(low, 1.5, like.shape).astype(like.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes(model, images))
