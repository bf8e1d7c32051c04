"""Dropout after the hidden dense layers, with BN between each of them and its dropout too (the third notebook's first arm).

    python -m bnjax.main --config configs/dropout_bn.py

Time: not measured
Expected: not measured
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.fallback = "digits"
    config.model.dropout = (0.4, 0.5)
    return config
