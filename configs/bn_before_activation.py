"""BN between each hidden layer and its activation, as in Ioffe & Szegedy (2015).

    python -m bnjax.main --config configs/bn_before_activation.py

Time: not measured
Expected: not measured
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.model.placement = "before"
    return config
