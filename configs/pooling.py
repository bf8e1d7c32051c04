"""Max pooling instead of the stride of the first layer.

    python -m bnjax.main --config configs/pooling.py

Time: not measured
Expected: not measured
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.model.pooling = "max"
    return config
