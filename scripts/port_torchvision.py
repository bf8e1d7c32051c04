"""Writes logits from PyTorch and Keras for the tests of porting; checks a file in PyTorch.

    python scripts/port_torchvision.py tests/clinic/port.json
    python scripts/port_torchvision.py --check NET.safetensors PROBE.safetensors

The first command runs a narrow and a full ResNet-18 and a narrow ResNet-50 (He et al., 2016) with
the layer names of torchvision, and small networks with the other layers that can be ported. A
formula gives the weights, here and in the tests, so no data are needed. The logits are computed in
float64. The second command loads a ResNet-18 of any width with `strict=True` and prints the largest
difference between its float32 logits and those in the probe.
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


def resnet(width=64, classes=1000, blocks=(2, 2, 2, 2), expansion=1):
    """Returns a network with torchvision's names; with `expansion` 4 its blocks are bottlenecks."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            outputs = expansion * width
            sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
            if expansion > 1:
                sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
            for i, (before, after, side, step) in enumerate(sizes, 1):
                conv = nn.Conv2d(before, after, side, step, side // 2, bias=False)
                setattr(self, f"conv{i}", conv)
                setattr(self, f"bn{i}", nn.BatchNorm2d(after))
            self.downsample = None
            if stride > 1 or inputs != outputs:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
                )

        def forward(self, x):
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
            if expansion > 1:
                y = self.bn3(self.conv3(y.relu()))
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.MaxPool2d(3, 2, 1)
            inputs = width
            for stage, count in enumerate(blocks):
                first = Block(inputs, width << stage, 2 if stage else 1)
                inputs = expansion * width << stage
                rest = [Block(inputs, width << stage, 1) for _ in range(count - 1)]
                setattr(self, f"layer{stage + 1}", nn.Sequential(first, *rest))
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


def torch_rows():
    """Yields the logits that torch computes."""
    import torch

    networks = {"resnet18 narrow": resnet(8, 10), "resnet18": resnet(), "flat": flat()}
    networks["resnet50 narrow"] = resnet(8, 10, (3, 4, 6, 3), expansion=4)
    for name, network in networks.items():
        shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
        images = uniform("images", int(np.prod(IMAGES[name]))).reshape(IMAGES[name])
        entry = {"version": torch.__version__, "images": IMAGES[name], "shapes": shapes}
        state = {key: torch.tensor(formula(key, tuple(shape))) for key, shape in shapes.items()}
        network.load_state_dict(state)
        with torch.no_grad():
            logits = network.double().eval()(torch.tensor(images, dtype=torch.float64))
        yield name, {**entry, "logits": logits[:, :: EVERY.get(name, 1)].numpy().round(6).tolist()}


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
    """Updates the rows of the installed frameworks."""
    table = json.loads(path.read_text()) if path.exists() else {}
    for rows in (torch_rows, keras_rows):
        with contextlib.suppress(ImportError):
            for name, entry in rows():
                table[name] = entry
                print(name, entry["version"])
    path.write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    check(*sys.argv[2:]) if sys.argv[1] == "--check" else main(Path(sys.argv[1]))
