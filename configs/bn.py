"""The tutorial's network with batch normalization at the input of every layer.

    python -m bnjax.main --config configs/bn.py

Time: TIME
Expected: EXPECTED
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.fallback = "digits"
    config.train.steps = 100
    config.train.epochs = 0.0
    return config
