"""BN that only normalises: neither scale nor shift is learnt (the second notebook's other arm).

    python -m bnjax.main --config configs/bn_no_scale_shift.py

Time: not measured
Expected: not measured
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.fallback = "digits"
    config.train.steps = 100
    config.train.epochs = 0.0
    config.model.scale = False
    config.model.shift = False
    return config
