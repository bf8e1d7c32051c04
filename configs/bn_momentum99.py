"""A common mistake: averages so slow (0.99, TensorFlow's default) that starting values dominate.

    python -m bnjax.main --config configs/bn_momentum99.py

Time: 22 minutes on two 2.4 GHz AVX2 cores with other load.
Expected: the same training metrics as bn.py (loss first at or below 0.2 at step 76), but chance
    level in evaluation: test loss 2.47 at step 20 and 4.09 at step 100, where bn.py has 1.41 and
    1.72; test accuracy 0.100 at step 100. One run, seed 0, on CIFAR-10 (JPEG): images recompressed
    as JPEG (quality 75).
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.model.momentum = 0.99
    return config
