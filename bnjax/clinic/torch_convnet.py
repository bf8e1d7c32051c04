"""bnjax's ConvNet as PyTorch has it: where its leaves go, and the source of the network."""

from typing import Any

import flax.linen as nn

from bnjax.clinic.conventions import norm_fields
from bnjax.clinic.layouts import PortError, Table
from bnjax.models.convnet import ACTIVATIONS, ConvNet
from bnjax.norms import BatchNorm, Identity

_ACTIVATIONS = {"relu": "ReLU", "sigmoid": "Sigmoid", "tanh": "Tanh"}
_POOLS = {"max": "MaxPool2d", "avg": "AvgPool2d"}


def convnet_table(model: ConvNet, image_shape: tuple[int, int, int]) -> Table:
    """Returns the table of a network: which layers are given flattened images [h, w, c].

    The layers are called the same there, as in `torch_source`.
    """
    first = "dense0" if model.dense else "logits"
    layers = [first]
    if _norm(model) is not None and model.placement == "input":
        layers.append(f"{first}_norm")
    shape = _last_images(model, image_shape)
    return Table(flattened=dict.fromkeys(layers, shape))


def torch_source(model: ConvNet, image_shape: tuple[int, int, int]) -> str:
    """Returns Python that makes `network`, a torch.nn.Sequential whose layers are called as here.

    It takes images [n, c, h, w], float from 0 to 1, and gives the same logits in evaluation.

    Args:
        model: the network.
        image_shape: [h, w, c].

    Raises:
        PortError: for a norm, a convolution or an activation that torch has not.

    >>> print(torch_source(ConvNet((4,), (3,), (2,), (), 10), (8, 8, 3)))
    from collections import OrderedDict
    from torch import nn
    network = nn.Sequential(OrderedDict([
        ("conv0", nn.Conv2d(3, 4, 3, 2)),
        ("conv0_activation", nn.ReLU()),
        ("flatten", nn.Flatten()),
        ("logits", nn.Linear(36, 10)),
    ]))
    """
    if model.conv is not nn.Conv or model.norm_activation is not None:
        raise PortError(
            "torch.nn has no convolution with standardised weights and no activation of frn, so "
            "this network has no counterpart there."
        )
    norm = _norm(model)
    rows: list[tuple[str, str]] = []

    def normalise(where: str, name: str, size: int, kind: str) -> None:
        if norm is not None and where == model.placement:
            options = _options(norm)
            rows.append((f"{name}_norm", f"BatchNorm{kind}({size}, {options})"))

    def activate(name: str, size: int, kind: str, normalised: bool = True) -> None:
        if normalised:
            normalise("before", name, size, kind)
        rows.append((f"{name}_activation", f"{_activation(model)}()"))
        if normalised:
            normalise("after", name, size, kind)

    size = image_shape[2]
    for i, (filters, kernel, stride) in enumerate(
        zip(model.filters, model.kernels, model.strides, strict=True)
    ):
        name, pooled = f"conv{i}", model.pooling != "none"
        normalise("input", name, size, "2d")
        rows.append((name, f"Conv2d({size}, {filters}, {kernel}, {1 if pooled else stride})"))
        activate(name, filters, "2d")
        if pooled and stride > 1:
            rows.append((f"{name}_pool", f"{_POOLS[model.pooling]}({stride})"))
        size = filters
    height, width, _ = _last_images(model, image_shape)
    size *= height * width
    rows.append(("flatten", "Flatten()"))
    normalised, rate = True, 0.0  # of what goes into the next layer
    hidden = zip(model.dense, model.norm_dense, model.dropout, strict=False)
    for name, width, norm_after, rate_after in [
        *((f"dense{i}", *layer) for i, layer in enumerate(hidden)),
        ("logits", model.classes, False, 0.0),
    ]:
        if normalised:
            normalise("input", name, size, "1d")
        if rate:
            rows.append((f"{name}_dropout", f"Dropout({rate})"))
        rows.append((name, f"Linear({size}, {width})"))
        if name != "logits":
            activate(name, width, "1d", norm_after)
        size, normalised, rate = width, norm_after, rate_after
    lines = [f'    ("{name}", nn.{layer}),' for name, layer in rows]
    return "\n".join(
        [
            "from collections import OrderedDict",
            "from torch import nn",
            "network = nn.Sequential(OrderedDict([",
            *lines,
            "]))",
        ]
    )


def _norm(model: ConvNet) -> Any:
    """Returns one of the network's norms, None if it has none.

    Raises:
        PortError: for one that is no batch norm.
    """
    norm = None if model.norm is None else model.norm(name="norm")
    if norm is None or isinstance(norm, Identity):
        return None
    if not isinstance(norm, nn.BatchNorm | BatchNorm):
        raise PortError(
            f"the network's norm is {type(norm).__name__}, and only batch norms are ported."
        )
    return norm


def _options(norm: Any) -> str:
    fields = norm_fields("torch", norm.epsilon, norm.momentum)
    if not (norm.use_scale or norm.use_bias):
        fields["affine"] = False
    return ", ".join(f"{name}={value}" for name, value in fields.items())


def _activation(model: ConvNet) -> str:
    for name, function in ACTIVATIONS.items():
        if function is model.activation:
            return _ACTIVATIONS[name]
    raise PortError(f"the activation {model.activation} has no known counterpart in torch.")


def _last_images(model: ConvNet, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns the shape [h, w, c] of what is flattened."""
    height, width, channels = image_shape
    for filters, kernel, stride in zip(model.filters, model.kernels, model.strides, strict=True):

        def after(side: int, kernel: int = kernel, stride: int = stride) -> int:
            if model.pooling != "none":
                return (side - kernel + 1) // stride
            return (side - kernel) // stride + 1

        height, width, channels = after(height), after(width), filters
    return height, width, channels
