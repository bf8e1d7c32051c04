"""The tutorial's network without batch normalization: what BN is compared with.

    python -m bnjax.main --config configs/no_bn.py

Time: not measured
Expected: not measured
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.fallback = "digits"
    config.train.steps = 400
    config.model.norm = "none"
    return config
