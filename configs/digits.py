"""Every piece in two minutes and without a network: a narrower net on scikit-learn's 1,797 real handwritten digits.

    python -m bnjax.main --config configs/digits.py

Time: TIME
Expected: EXPECTED
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.name = "digits"
    config.model.filters = (16, 32, 32)
    config.model.dense = (256, 64)
    config.train.epochs = 10.0
    config.train.batch_size = 128
    config.train.shuffle = True
    return config
