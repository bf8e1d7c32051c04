"""Networks of NNX: twins of the linen networks of other tests, and three of today's kind.

A twin is built from its linen model. Its modules have the names of the linen modules, so its
variables have the same paths, and `twin` moves those of the linen network into it.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from foreign import PreActResNet, RematNet, ResNet, ScanNet, SharedNet, VmapNet
from patients import Plain

from bnjax import clinic
from bnjax.models.convnet import ConvNet

List = getattr(nnx, "List", list)  # before Flax 0.12 a list of modules was a list


class PlainNnx(nnx.Module):
    def __init__(self, of, rngs):
        norm = functools.partial(
            nnx.BatchNorm,
            of.width,
            momentum=of.momentum,
            epsilon=of.epsilon,
            use_fast_variance=of.norm is nn.BatchNorm,  # ours has two passes
            rngs=rngs,
        )
        self.Dense_0 = nnx.Linear(192, of.width, dtype=of.dtype, rngs=rngs)
        self.first = norm()
        self.dropout = nnx.Dropout(of.dropout, rngs=rngs)
        self.Dense_1 = nnx.Linear(of.width, of.width, dtype=of.dtype, rngs=rngs)
        self.second = norm()
        self.Dense_2 = nnx.Linear(of.width, 10, rngs=rngs)
        self.offset, self.flag = of.offset, False if of.always_batch else None

    def __call__(self, x):
        x = self.Dense_0(x.reshape(len(x), -1)) + jnp.asarray(self.offset, x.dtype)
        x = self.dropout(nnx.relu(self.first(x, use_running_average=self.flag)))
        x = nnx.relu(self.second(self.Dense_1(x), use_running_average=self.flag))
        return self.Dense_2(x)


class BlockNnx(nnx.Module):
    def __init__(self, inputs, filters, strides, momentum, rngs):
        norm = functools.partial(nnx.BatchNorm, filters, momentum=momentum, rngs=rngs)
        self.Conv_0 = conv(inputs, filters, 3, strides, rngs=rngs)
        self.BatchNorm_0 = norm()
        self.Conv_1 = conv(filters, filters, 3, rngs=rngs)
        self.BatchNorm_1 = norm()
        self.is_changed = strides > 1 or inputs != filters
        if self.is_changed:
            self.conv_proj, self.norm_proj = conv(inputs, filters, 1, strides, rngs=rngs), norm()

    def __call__(self, x):
        y = nnx.relu(self.BatchNorm_0(self.Conv_0(x)))
        y = self.BatchNorm_1(self.Conv_1(y))
        return nnx.relu(y + (self.norm_proj(self.conv_proj(x)) if self.is_changed else x))


def conv(inputs, filters, size, strides=1, **options):
    return nnx.Conv(inputs, filters, (size, size), strides, use_bias=False, **options)


class ResNetNnx(nnx.Module):
    def __init__(self, of, rngs):
        self.conv_init = conv(3, of.width, 3, rngs=rngs)
        self.norm_init = nnx.BatchNorm(of.width, momentum=of.momentum, rngs=rngs)
        width, self.count = of.width, sum(of.stages)
        shapes = [
            (of.width * 2**i, 2 if i > 0 and j == 0 else 1)
            for i, blocks in enumerate(of.stages)
            for j in range(blocks)
        ]
        for i, (filters, strides) in enumerate(shapes):
            block = BlockNnx(width, filters, strides, of.momentum, rngs)
            setattr(self, f"BasicBlock_{i}", block)
            width = filters
        self.Dense_0 = nnx.Linear(width, of.classes, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm_init(self.conv_init(x)))
        for i in range(self.count):
            x = getattr(self, f"BasicBlock_{i}")(x)
        return self.Dense_0(x.mean((1, 2)))


class PreActNnx(nnx.Module):
    def __init__(self, of, rngs):
        self.count = 2 * of.blocks
        for i in range(self.count + 1):
            name = f"BatchNorm_{i}" if i < self.count else "last"
            setattr(self, f"Conv_{i}", conv(of.width if i else 3, of.width, 3, rngs=rngs))
            setattr(self, name, nnx.BatchNorm(of.width, momentum=of.momentum, rngs=rngs))
        self.Dense_0 = nnx.Linear(of.width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.Conv_0(x)
        for i in range(0, self.count, 2):
            y = x
            for j in (i, i + 1):
                norm, layer = (getattr(self, name) for name in (f"BatchNorm_{j}", f"Conv_{j + 1}"))
                y = layer(nnx.relu(norm(y)))
            x = x + y
        return self.Dense_0(nnx.relu(self.last(x)).mean((1, 2)))


class LayerNnx(nnx.Module):
    def __init__(self, inputs, of, rngs):
        self.Dense_0 = nnx.Linear(inputs, of.width, rngs=rngs)
        momentum = getattr(of, "momentum", 0.9)
        self.BatchNorm_0 = nnx.BatchNorm(of.width, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.BatchNorm_0(self.Dense_0(x)))


def stacked(count, *of, rngs):
    """Layers whose variables have a first axis of `count`."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(axis_size=count)
    def make(rngs):
        return LayerNnx(*of, rngs)

    return make(rngs)


class ScanNnx(nnx.Module):
    def __init__(self, of, rngs):
        self.Dense_0 = nnx.Linear(192, of.width, rngs=rngs)
        self.layers = stacked(of.layers, of.width, of, rngs=rngs)
        self.Dense_1 = nnx.Linear(of.width, 10, rngs=rngs)

    def __call__(self, x):
        scanned = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.Dense_1(scanned(self.Dense_0(x.reshape(len(x), -1)), self.layers))


class VmapNnx(nnx.Module):
    def __init__(self, of, rngs):
        self.heads = stacked(of.heads, 192, of, rngs=rngs)
        self.Dense_0 = nnx.Linear(of.width, 10, rngs=rngs)

    def __call__(self, x):
        heads = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))
        return self.Dense_0(heads(self.heads, x.reshape(len(x), -1)).mean(0))


class RematNnx(nnx.Module):
    def __init__(self, of, rngs):
        self.count = of.layers
        for i in range(of.layers):
            setattr(self, f"layer{i}", LayerNnx(of.width if i else 192, of, rngs))
        self.Dense_0 = nnx.Linear(of.width, 10, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(len(x), -1)
        for i in range(self.count):
            x = nnx.remat(lambda layer, x: layer(x))(getattr(self, f"layer{i}"), x)
        return self.Dense_0(x)


class SharedNnx(nnx.Module):
    def __init__(self, of, rngs):
        self.Dense_0 = nnx.Linear(192, of.width, rngs=rngs)
        self._Layer_0 = LayerNnx(of.width, of, rngs)
        self.again = self._Layer_0
        self.Dense_1 = nnx.Linear(of.width, 10, rngs=rngs)

    def __call__(self, x):
        return self.Dense_1(self.again(self._Layer_0(self.Dense_0(x.reshape(len(x), -1)))))


class ConvNetNnx(nnx.Module):
    """For images of 8x8; of the options, those of the patients."""

    def __init__(self, of, rngs):
        norm_of = of.norm(name="norm")
        options = {"momentum": norm_of.momentum, "epsilon": norm_of.epsilon, "rngs": rngs}
        self.placement, self.activation = of.placement, of.activation
        size, channels, layers = 8, 3, {}
        for i, (filters, kernel, stride) in enumerate(
            zip(of.filters, of.kernels, of.strides, strict=True)
        ):
            layers[f"conv{i}"] = (
                channels,
                nnx.Conv(
                    channels,
                    filters,
                    (kernel, kernel),
                    stride,
                    padding="VALID",
                    dtype=of.dtype,
                    rngs=rngs,
                ),
            )
            size, channels = (size - kernel) // stride + 1, filters
        inputs = size**2 * channels
        for i, width in enumerate((*of.dense, of.classes)):
            name = f"dense{i}" if i < len(of.dense) else "logits"
            layers[name] = inputs, nnx.Linear(inputs, width, dtype=of.dtype, rngs=rngs)
            inputs = width
        self.names = tuple(layers)
        for name, (given, layer) in layers.items():
            setattr(self, name, layer)
            returned = layer.out_features
            if of.placement == "pre":
                setattr(self, f"{name}_norm", nnx.BatchNorm(given, **options))
            elif name != "logits":
                setattr(self, f"{name}_norm", nnx.BatchNorm(returned, **options))
        self.dropout = nnx.Dropout(of.dropout[-1], rngs=rngs)

    def __call__(self, x, mask=None):
        for name in self.names:
            if name == "dense0":
                x = x.reshape(len(x), -1)

            def norm(x, name=name):
                whole = None if mask is None else mask.reshape(-1, *[1] * (x.ndim - 1))
                return getattr(self, f"{name}_norm")(x, mask=whole)

            x = norm(x) if self.placement == "pre" else x
            x = self.dropout(x) if name == "logits" else x
            x = getattr(self, name)(x)
            if name == "logits":
                return x.astype(jnp.promote_types(x.dtype, jnp.float32))
            x = norm(x) if self.placement == "before" else x
            x = self.activation(x)
            x = norm(x) if self.placement == "after" else x
        return x


TWINS = {
    Plain: PlainNnx,
    ResNet: ResNetNnx,
    PreActResNet: PreActNnx,
    ScanNet: ScanNnx,
    VmapNet: VmapNnx,
    RematNet: RematNnx,
    SharedNet: SharedNnx,
    ConvNet: ConvNetNnx,
}


def twin(model, params, batch_stats, **options):
    """Returns a linen network as a network of NNX, of the same weights and statistics."""
    network = clinic.nnx(TWINS[type(model)](model, nnx.Rngs(0)), **options)
    return network.replace(params=params, batch_stats=batch_stats)


# Of the kind of jax-ml/bonsai, for images of 16x16; with lists, Sequential, and flags of training
# that are given in three ways.


class Bottleneck(nnx.Module):
    """He et al., 2016a, figure 5."""

    def __init__(self, inputs, width, strides, rngs):
        norm = functools.partial(nnx.BatchNorm, momentum=0.9, rngs=rngs)
        self.conv0, self.norm0 = conv(inputs, width, 1, rngs=rngs), norm(width)
        self.conv1, self.norm1 = conv(width, width, 3, strides, rngs=rngs), norm(width)
        self.conv2, self.norm2 = conv(width, 2 * width, 1, rngs=rngs), norm(2 * width)
        self.downsample = nnx.Sequential(
            conv(inputs, 2 * width, 1, strides, rngs=rngs), norm(2 * width)
        )

    def __call__(self, x):
        y = nnx.relu(self.norm0(self.conv0(x)))
        y = nnx.relu(self.norm1(self.conv1(y)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.downsample(x))


class ResNet50Like(nnx.Module):
    """The mode is set with `model.train()` and `model.eval()`."""

    def __init__(self, rngs):
        self.stem = nnx.Sequential(conv(3, 8, 3, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.relu)
        self.blocks = List([Bottleneck(8, 4, 1, rngs), Bottleneck(8, 8, 2, rngs)])
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class MBConv(nnx.Module):
    """Tan & Le, 2019: depthwise convolution, squeeze and excitation, stochastic depth."""

    def __init__(self, inputs, outputs, strides, rngs):
        norm = functools.partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-3, rngs=rngs)
        wide = 4 * inputs
        self.expand, self.norm0 = conv(inputs, wide, 1, rngs=rngs), norm(wide)
        self.depthwise = conv(wide, wide, 3, strides, feature_group_count=wide, rngs=rngs)
        self.norm1 = norm(wide)
        self.squeeze = nnx.Conv(wide, inputs // 2, (1, 1), rngs=rngs)
        self.excite = nnx.Conv(inputs // 2, wide, (1, 1), rngs=rngs)
        self.project, self.norm2 = conv(wide, outputs, 1, rngs=rngs), norm(outputs)
        self.drop = nnx.Dropout(0.1, broadcast_dims=(1, 2, 3), rngs=rngs)

    def __call__(self, x, training):
        flag = {"use_running_average": not training}
        y = nnx.swish(self.norm0(self.expand(x), **flag))
        y = nnx.swish(self.norm1(self.depthwise(y), **flag))
        gate = self.excite(nnx.swish(self.squeeze(y.mean((1, 2), keepdims=True))))
        y = self.norm2(self.project(y * nnx.sigmoid(gate)), **flag)
        return x + self.drop(y, deterministic=not training) if x.shape == y.shape else y


class EfficientNetLike(nnx.Module):
    """The mode is the argument `training`."""

    def __init__(self, rngs):
        norm = functools.partial(nnx.BatchNorm, momentum=0.99, epsilon=1e-3, rngs=rngs)
        self.stem, self.stem_norm = conv(3, 8, 3, 2, rngs=rngs), norm(8)
        self.blocks = List([MBConv(8, 8, 1, rngs), MBConv(8, 12, 2, rngs)])
        self.top, self.top_norm = conv(12, 16, 1, rngs=rngs), norm(16)
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x, training):
        x = nnx.swish(self.stem_norm(self.stem(x), use_running_average=not training))
        for block in self.blocks:
            x = block(x, training)
        x = nnx.swish(self.top_norm(self.top(x), use_running_average=not training))
        return self.head(x.mean((1, 2)))


class DenseLayer(nnx.Module):
    def __init__(self, inputs, growth, rngs):
        norm = functools.partial(nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.norm0, self.conv0 = norm(inputs), conv(inputs, 2 * growth, 1, rngs=rngs)
        self.norm1, self.conv1 = norm(2 * growth), conv(2 * growth, growth, 3, rngs=rngs)

    def __call__(self, x):
        y = self.conv0(nnx.relu(self.norm0(x)))
        return jnp.concatenate([x, self.conv1(nnx.relu(self.norm1(y)))], -1)


class DenseNetLike(nnx.Module):
    """Huang et al., 2017. All norms were built for evaluation."""

    def __init__(self, rngs):
        norm = functools.partial(nnx.BatchNorm, use_running_average=True, rngs=rngs)
        self.stem, self.stem_norm = conv(3, 8, 3, rngs=rngs), norm(8)
        self.dense0 = List([DenseLayer(8 + 4 * i, 4, rngs) for i in range(2)])
        self.transition_norm, self.transition = norm(16), conv(16, 8, 1, rngs=rngs)
        self.dense1 = List([DenseLayer(8 + 4 * i, 4, rngs) for i in range(2)])
        self.last, self.head = norm(16), nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for layer in self.dense0:
            x = layer(x)
        x = nnx.avg_pool(self.transition(nnx.relu(self.transition_norm(x))), (2, 2), (2, 2))
        for layer in self.dense1:
            x = layer(x)
        return self.head(nnx.relu(self.last(x)).mean((1, 2)))
