"""The tutorial's training step in TensorFlow, for comparison with `scripts/bench.py`.

    python scripts/peers/step_tensorflow.py FOLDER BATCH STEPS

FOLDER holds CIFAR-10 in the binary version. Prints one JSON line with the median time of a step in
seconds (all steps but the first two) and the first losses. It is a graph of `tf.layers`, as in the
tutorial. Needs TensorFlow 2.15 or older (`tf.layers` needs Keras 2), not bnjax.
"""

import argparse
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

WARM_UP = 2


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("batch", type=int)
    parser.add_argument("steps", type=int)
    args = parser.parse_args()
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"  # TensorFlow reads it when it is imported
    warnings.simplefilter("ignore")
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    tf.logging.set_verbosity(tf.logging.ERROR)
    files = sorted(args.folder.rglob("data_batch_[1-5].bin"))
    rows = np.concatenate([np.fromfile(file, np.uint8).reshape(-1, 3073) for file in files])
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    images, labels = (images / 255).astype(np.float32), rows[:, 0].astype(np.int64)

    x, y = tf.placeholder(tf.float32, [None, 32, 32, 3]), tf.placeholder(tf.int64, [None])
    net = x

    def normalised(net: Any) -> Any:
        return tf.layers.batch_normalization(net, momentum=0.75, training=True)

    for filters, stride in ((30, 2), (50, 1), (60, 1)):
        net = tf.layers.conv2d(normalised(net), filters, 3, stride, activation=tf.nn.relu)
    net = tf.layers.flatten(net)
    for units in (3500, 700):
        net = tf.layers.dense(normalised(net), units, activation=tf.nn.relu)
    logits = tf.layers.dense(normalised(net), 10)
    loss = tf.losses.sparse_softmax_cross_entropy(y, logits)
    with tf.control_dependencies(tf.get_collection(tf.GraphKeys.UPDATE_OPS)):
        train = tf.train.AdamOptimizer().minimize(loss)

    seconds, losses = [], []
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        for step in range(args.steps):
            start = step * args.batch % (len(images) - args.batch + 1)
            began = time.perf_counter()
            rows = slice(start, start + args.batch)
            _, value = session.run([train, loss], {x: images[rows], y: labels[rows]})
            losses.append(float(value))
            seconds.append(time.perf_counter() - began)
    step_s = float(np.median(seconds[WARM_UP:]))
    found = {
        "peer": f"tensorflow {tf.__version__}",
        "batch": args.batch,
        "step_s": step_s,
        "images_per_s": args.batch / step_s,
        "losses": losses[:6],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
