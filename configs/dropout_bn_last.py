"""Dropout after the hidden dense layers and the last BN before them (the third notebook's second arm).

    python -m bnjax.main --config configs/dropout_bn_last.py

Time: not measured
Expected: not measured
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.fallback = "digits"
    config.model.dropout = (0.4, 0.5)
    config.model.norm_dense = (False, False)
    return config
