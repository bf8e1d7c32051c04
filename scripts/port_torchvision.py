"""Writes what PyTorch and Keras compute, for the tests of porting; checks a file in PyTorch.

    python scripts/port_torchvision.py tests/clinic/port.json
    python scripts/port_torchvision.py --check NET.safetensors PROBE.safetensors

The first runs a ResNet-18 (He et al., 2016) whose layers are called as torchvision's, once narrow
and once as it is, a narrow ResNet-50, and small networks with what else there is to port. Weights
come from a formula, here and in the tests, so that no data are needed; logits are of float64. The
second loads a ResNet-18 of any width with `strict=True` and says how far its float32 logits are
from those in the probe.
"""

import contextlib
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "torch")

IMAGES = dict.fromkeys(("resnet18 narrow", "resnet18", "resnet50 narrow"), (2, 3, 64, 64))
IMAGES["flat"] = (3, 3, 9, 8)
EVERY = {"resnet18": 50}  # the logits of every so many classes; of the others all are kept


def uniform(name, size):
    """Returns float32 [size] from 0 to 1 that depend on the name: the same bits everywhere."""
    x = np.arange(size, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 24)
    for multiplier, shift in ((0x9E3779B97F4A7C15, 30), (0xBF58476D1CE4E5B9, 27)):
        x = x * np.uint64(multiplier)
        x = x ^ (x >> np.uint64(shift))
    return ((x >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)


def formula(name, shape):
    """Returns a leaf by its name, `.` or `/` before the last word, and its shape there."""
    leaf, size = name.replace("/", ".").split(".")[-1], int(np.prod(shape))
    if leaf in ("num_batches_tracked", "count"):
        return np.int64(5)
    u = 2 * uniform(name, size).reshape(shape) - 1
    if len(shape) > 1:
        outputs = shape[0] if leaf == "weight" else shape[-1]
        return u * np.float32((4 * outputs / size) ** 0.5)
    if leaf in ("running_var", "var", "moving_variance"):
        return 1 + u / 2
    return 1 + u / 4 if leaf in ("weight", "scale", "gamma") else u / 8


def checksum(key, value):
    """Returns a number that changes if the values of a leaf change places."""
    value = np.asarray(value, np.float64).ravel()
    return float(f"{value @ uniform(key + ' checked', value.size):.6g}")


def resnet(width=64, classes=1000, blocks=(2, 2, 2, 2), expansion=1):
    """Returns the network with the names that torchvision has; expansion 4: of bottlenecks."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            outputs, large = width * expansion, expansion > 1
            sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
            if large:
                sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            self.layers = range(1, len(sizes) + 1)
            for i, (into, out, side, step) in zip(self.layers, sizes, strict=True):
                conv = nn.Conv2d(into, out, side, step, side // 2, bias=False)
                setattr(self, f"conv{i}", conv)
                setattr(self, f"bn{i}", nn.BatchNorm2d(out))
            self.downsample = None
            if stride > 1 or inputs != outputs:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            y = x
            for i in self.layers:
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = y if i == self.layers[-1] else y.relu()
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            inputs = width
            for stage, count in enumerate(blocks):
                made = []
                for i in range(count):
                    made.append(Block(inputs, width << stage, 2 if stage and not i else 1))
                    inputs = expansion * width << stage
                setattr(self, f"layer{stage + 1}", nn.Sequential(*made))
            self.fc = nn.Linear(inputs, classes)

        def forward(self, x):
            x = self.maxpool(self.bn1(self.conv1(x)).relu())
            x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
            return self.fc(x.mean((2, 3)))

    return Network()


def flat():
    """Returns a network with groups, a norm and a dense layer after flattening, no affine norm."""
    from collections import OrderedDict

    from torch import nn

    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(3, 4, 3),
            norm=nn.BatchNorm2d(4, eps=1e-2),
            relu=nn.ReLU(),
            depthwise=nn.Conv2d(4, 8, 3, 2, groups=4),
            flatten=nn.Flatten(),
            flat_norm=nn.BatchNorm1d(8 * 3 * 2),
            dense=nn.Linear(8 * 3 * 2, 7),
            plain_norm=nn.BatchNorm1d(7, affine=False),
            logits=nn.Linear(7, 5),
        )
    )


# Where Flax has each leaf of the two networks, by hand: tests/foreign.py calls its layers so.
def flax_name(key):
    """Returns the path in Flax of a key of torch, without the leaf."""
    layer = key.rpartition(".")[0]
    if not layer.startswith("layer"):
        return {"conv1": "conv_init", "bn1": "norm_init", "fc": "Dense_0"}.get(layer, layer)
    stage, block, *rest = layer.removeprefix("layer").split(".")
    inner = {
        "conv1": "Conv_0",
        "bn1": "BatchNorm_0",
        "conv2": "Conv_1",
        "bn2": "BatchNorm_1",
        "downsample.0": "conv_proj",
        "downsample.1": "norm_proj",
    }[".".join(rest)]
    return f"BasicBlock_{2 * (int(stage) - 1) + int(block)}.{inner}"


def from_flax(key, shape):
    """Returns the torch leaf of a Flax network whose leaves come from the formula."""
    name, leaf = flax_name(key), key.rpartition(".")[2]
    if leaf == "num_batches_tracked":
        return np.int64(0)
    if name == "dense" and leaf == "weight":  # [out, c h w] from rows [h w c]
        kernel = formula("dense.kernel", (48, shape[0])).reshape(3, 2, 8, shape[0])
        return kernel.transpose(3, 2, 0, 1).reshape(shape)
    flax_leaf = {"running_mean": "mean", "running_var": "var", "bias": "bias"}.get(leaf)
    if flax_leaf is None:
        flax_leaf = "scale" if len(shape) == 1 else "kernel"
    if name == "flat_norm":
        vector = formula(f"{name}.{flax_leaf}", shape).reshape(3, 2, 8)
        return vector.transpose(2, 0, 1).reshape(shape)
    if len(shape) == 4:
        out, into, height, width = shape
        kernel = formula(f"{name}.kernel", (height, width, into, out))
        return kernel.transpose(3, 2, 0, 1)
    if len(shape) == 2:
        return formula(f"{name}.kernel", shape[::-1]).T
    return formula(f"{name}.{flax_leaf}", shape)


def torch_rows():
    """Yields what torch computes, with weights that are made there, and that are made in Flax."""
    import torch

    networks = {"resnet18 narrow": resnet(8, 10), "resnet18": resnet(), "flat": flat()}
    networks["resnet50 narrow"] = resnet(8, 10, (3, 4, 6, 3), 4)
    for name, network in networks.items():
        shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
        images = uniform("images", int(np.prod(IMAGES[name]))).reshape(IMAGES[name])
        entry = {"version": torch.__version__, "images": IMAGES[name], "shapes": shapes}
        ways = {"from_torch": formula, "to_torch": from_flax}
        if name == "resnet50 narrow":  # its names in Flax are not those that are known here
            del ways["to_torch"]
        for way, make in ways.items():
            state = {key: make(key, tuple(shape)) for key, shape in shapes.items()}
            network.load_state_dict({key: torch.tensor(value) for key, value in state.items()})
            with torch.no_grad():
                logits = network.double().eval()(torch.tensor(images, dtype=torch.float64))
            logits = logits[:, :: EVERY.get(name, 1)].numpy().round(6).tolist()
            entry[way] = {"logits": logits}
            if way == "to_torch":
                entry[way]["checksums"] = {key: checksum(key, state[key]) for key in state}
        yield name, entry


def keras_rows():
    """Yields what Keras 3 computes; its arrays are called by the paths of its variables."""
    import keras
    from keras import layers

    keras.config.set_floatx("float64")
    x = inputs = keras.Input((9, 8, 3))
    for layer in (
        layers.Conv2D(4, 3, name="conv"),
        layers.BatchNormalization(name="norm", epsilon=1e-2),
        layers.ReLU(),
        layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
        layers.Flatten(),
        layers.BatchNormalization(name="flat_norm", scale=False),
        layers.Dense(5, name="logits"),
    ):
        x = layer(x)
    network = keras.Model(inputs, x)
    shapes = {variable.path: list(variable.shape) for variable in network.weights}
    for variable in network.weights:
        variable.assign(formula(variable.path, tuple(variable.shape)))
    images = uniform("images", 3 * 9 * 8 * 3).reshape(3, 9, 8, 3)
    logits = keras.ops.convert_to_numpy(network(images, training=False)).round(6).tolist()
    entry = {"version": keras.__version__, "images": [3, 9, 8, 3], "shapes": shapes}
    yield "keras", {**entry, "logits": logits}


def check(weights, probe):
    """Prints how far torch's float32 logits are from those in the probe."""
    import torch
    from safetensors.torch import load_file

    state, batch = load_file(weights), load_file(probe)
    network = resnet(state["bn1.weight"].numel(), state["fc.bias"].numel()).eval()
    network.load_state_dict(state, strict=True)
    with torch.no_grad():
        difference = (network(batch["image"]) - batch["logits"]).abs().max()
    print(f"largest difference {difference:.2e}, largest logit {batch['logits'].abs().max():.3g}")


def main(path):
    """Brings the rows of the frameworks at hand up to date."""
    table = json.loads(path.read_text()) if path.exists() else {}
    for rows in (torch_rows, keras_rows):
        with contextlib.suppress(ImportError):
            for name, entry in rows():
                table[name] = entry
                print(name, entry["version"])
    path.write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    check(*sys.argv[2:]) if sys.argv[1] == "--check" else main(Path(sys.argv[1]))
