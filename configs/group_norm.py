"""Group norm before each activation with weight standardization; needs no batch statistics.

    python -m bnjax.main --config configs/group_norm.py

Time: not measured
Expected: not measured
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.model.norm = "group"
    config.model.groups = 10
    config.model.placement = "before"
    config.model.weight_standardization = True
    return config
