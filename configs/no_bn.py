"""The tutorial's network without batch normalization: what BN is compared with.

    python -m bnjax.main --config configs/no_bn.py

Time: 70 minutes on two 2.4 GHz AVX2 cores.
Expected: not measured
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.fallback = "digits"
    config.train.steps = 400
    config.train.epochs = 0.0
    config.model.norm = "none"
    return config
