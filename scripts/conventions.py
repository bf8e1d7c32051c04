"""Writes the statistics that other frameworks store after a few updates, for the tests.

    python scripts/conventions.py tests/norms/conventions.json

Runs each framework that can be imported (PyTorch; TensorFlow with the fused kernel and without;
Keras) and replaces the rows of that framework in the file; other rows stay unchanged. Run the
script once in each environment that has one of the frameworks.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

SIZES = (2, 8, 32)  # values per channel
KEPT = 0.9  # the fraction of the old average that is kept
EPSILON = 1e-3
UPDATES = 3


def batches(size):
    """Returns the batches [UPDATES, size, 1, 1, 2], of numbers without a random generator."""
    index = np.arange(UPDATES * size * 2, dtype=np.float32)
    return (np.sin(index) * 3 + index % 5).reshape(UPDATES, size, 1, 1, 2)


def torch_rows():
    """Yields torch.nn.BatchNorm2d, whose momentum is one minus ours."""
    import torch

    for size in SIZES:
        layer = torch.nn.BatchNorm2d(2, eps=EPSILON, momentum=1 - KEPT)
        for batch in batches(size):
            y = layer(torch.tensor(batch).permute(0, 3, 1, 2))
        yield (
            "torch",
            torch.__version__,
            size,
            layer.running_mean,
            layer.running_var,
            y.detach().permute(0, 2, 3, 1),
        )


def tensorflow_rows():
    """Yields tf.compat.v1.layers.BatchNormalization, with the fused kernel and without."""
    import tensorflow as tf

    for fused in (True, False):
        for size in SIZES:
            layer = tf.compat.v1.layers.BatchNormalization(
                momentum=KEPT, epsilon=EPSILON, fused=fused
            )
            for batch in batches(size):
                y = layer(tf.constant(batch), training=True)
            name = "tensorflow fused" if fused else "tensorflow not fused"
            yield name, tf.__version__, size, layer.moving_mean, layer.moving_variance, y


def keras_rows():
    """Yields keras.layers.BatchNormalization of Keras 3."""
    import keras

    if keras.__version__.startswith("2."):  # part of TensorFlow, whose kernels it uses
        return
    for size in SIZES:
        layer = keras.layers.BatchNormalization(momentum=KEPT, epsilon=EPSILON)
        for batch in batches(size):
            y = layer(batch, training=True)
        numpy = keras.ops.convert_to_numpy
        yield (
            "keras",
            keras.__version__,
            size,
            numpy(layer.moving_mean),
            numpy(layer.moving_variance),
            numpy(y),
        )


def main(path):
    """Updates the rows of the installed frameworks."""
    table = (
        json.loads(path.read_text())
        if path.exists()
        else {"kept": KEPT, "epsilon": EPSILON, "frameworks": {}}
    )
    for rows in (torch_rows, tensorflow_rows, keras_rows):
        with contextlib.suppress(ImportError):
            for name, version, size, mean, var, y in rows():
                entry = table["frameworks"].setdefault(name, {"sizes": {}})
                entry["version"] = str(version)
                entry["sizes"][str(size)] = {
                    "mean": np.asarray(mean).astype(float).round(6).tolist(),
                    "var": np.asarray(var).astype(float).round(6).tolist(),
                    "last_output_of_first": np.asarray(y)[0]
                    .ravel()
                    .astype(float)
                    .round(6)
                    .tolist(),
                }
                print(name, version, size, entry["sizes"][str(size)])
    for size in SIZES:
        table.setdefault("batches", {})[str(size)] = (
            batches(size).reshape(UPDATES, size, 2).astype(float).round(7).tolist()
        )
    path.write_text(json.dumps(table, indent=None, separators=(", ", ": ")) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
