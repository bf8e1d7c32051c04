"""The trap: averages so slow (TensorFlow's default, 0.99) that evaluation still uses their starting values.

    python -m bnjax.main --config configs/bn_momentum99.py

Time: not measured
Expected: not measured
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.fallback = "digits"
    config.model.momentum = 0.99
    return config
