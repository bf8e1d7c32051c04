"""BN that only normalises: neither scale nor shift is learnt (the second notebook's other arm).

    python -m bnjax.main --config configs/bn_no_scale_shift.py

Time: not measured
Expected: not measured
"""

from bnjax import defaults


def get_config():
    config = defaults.get_config()
    config.data.fallback = "digits"
    config.model.scale = False
    config.model.shift = False
    return config
