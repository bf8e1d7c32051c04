"""One batch norm folded into one convolution or dense layer beside it: the arithmetic."""

from typing import Literal

import numpy as np

from bnjax.types import Array

# Where the norm stands: after the layer, or before it.
Place = Literal["after", "before"]


def fold_pair(
    kernel: Array,
    bias: Array | None,
    scale: Array | None,
    shift: Array | None,
    mean: Array,
    var: Array,
    epsilon: float,
    *,
    norm: Place,
    groups: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the kernel and the bias of the layer that does what layer and norm do in evaluation.

    With the gain g = scale / sqrt(var + epsilon), a norm after the layer gives
    kernel' = kernel g and bias' = (bias - mean) g + shift, over the outputs; one before it gives
    kernel' = g kernel and bias' = bias + the sum of kernel (shift - mean g), over the inputs. The
    latter is exact where the layer sees nothing but the norm's output: not where it pads.

    Args:
        kernel: [..., in / groups, out], as Flax has it.
        bias: [out]; None for 0.
        scale, shift: of the norm, [c]; None for 1 and 0.
        mean, var: likewise; the variance is the one that the norm divides by.
        epsilon: added to the variance.
        norm: where the norm stands. "after": c = out. "before": c = in, or divides it where
            positions were flattened into channels, channels last: input j is of channel j mod c.
        groups: of a convolution, its `feature_group_count`.

    Returns:
        Both in the dtype of the kernel, computed in float64.

    Raises:
        ValueError: if the channels do not fit, or a variance with epsilon is not above 0.

    >>> one, two = np.ones(1), np.full(1, 2.0)
    >>> fold_pair(np.ones((1, 1)), None, two, one, 3 * one, one, 3.0, norm="after")
    (array([[1.]]), array([-2.]))
    """
    gain, offset = gain_and_offset(scale, shift, mean, var, epsilon)
    if not (np.isfinite(gain).all() and np.isfinite(offset).all()):
        raise ValueError("a variance with epsilon is not above 0, or the norm is not finite")
    weight, out = np.asarray(kernel, np.float64), kernel.shape[-1]
    own = np.zeros(out) if bias is None else np.asarray(bias, np.float64)
    weight, own = folded(weight, own, gain, offset, norm, groups)
    return weight.astype(kernel.dtype), own.astype(kernel.dtype)


def gain_and_offset(
    scale: Array | None, shift: Array | None, mean: Array, var: Array, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns g and h, float64 [c], of a norm that is y = g x + h; not finite if var is wrong."""
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = 1 / np.sqrt(np.asarray(var, np.float64) + epsilon)
        gain = gain if scale is None else gain * np.asarray(scale, np.float64)
        offset = -np.asarray(mean, np.float64) * gain
    return gain, offset if shift is None else offset + np.asarray(shift, np.float64)


def folded(
    kernel: np.ndarray,
    bias: np.ndarray,
    gain: np.ndarray,
    offset: np.ndarray,
    norm: Place,
    groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns kernel and bias with a norm y = gain x + offset folded in; all in float64.

    Arguments and errors as for `fold_pair`.
    """
    inputs, outputs, channels = kernel.shape[-2] * groups, kernel.shape[-1], len(gain)
    if norm == "after":
        if channels != outputs:
            raise ValueError(f"the norm has {channels} channels and the layer {outputs} outputs")
        return kernel * gain, bias * gain + offset
    if inputs % channels:
        raise ValueError(f"the norm has {channels} channels and the layer {inputs} inputs")

    def of_weights(values: np.ndarray) -> np.ndarray:
        """Spreads values of the channels over the kernel's inputs and outputs [in / groups, out].

        Each group of outputs has inputs of its own.
        """
        by_group = np.tile(values, inputs // channels).reshape(groups, -1).T
        return np.repeat(by_group, outputs // groups, axis=1)

    added = (kernel * of_weights(offset)).reshape(-1, outputs).sum(0)
    return kernel * of_weights(gain), bias + added
