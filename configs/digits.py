"""A complete run in a minute, offline: a narrow network on the 1,797 embedded handwritten digits.

    python -m bnjax.main --config configs/digits.py

Time: half a minute on two 2.4 GHz AVX2 cores.
Expected: a test accuracy of 0.986 and a test loss of 0.055 at the end. One run with seed 0; the
    variation across seeds was not measured.
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.name = "digits"
    config.model.filters = (16, 32, 32)
    config.model.dense = (256, 64)
    config.train.steps = 0
    config.train.epochs = 10.0
    config.train.batch_size = 128
    config.train.shuffle = True
    return config
