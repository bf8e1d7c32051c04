"""A common mistake: averages so slow (0.99, TensorFlow's default) that initial values dominate.

    python -m bnjax.main --config configs/bn_momentum99.py

Time: 22 minutes on two busy 2.4 GHz AVX2 cores.
Expected: the same training metrics as with bn.py (a loss of 0.2 is reached at step 76), but chance
    level in evaluation. The test loss is 2.47 at step 20 and 4.09 at step 100, compared with 1.41
    and 1.72 for bn.py; the test accuracy is 0.100 at step 100. One run with seed 0 on CIFAR-10
    (JPEG), that is, images recompressed as JPEG (quality 75).
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.model.momentum = 0.99
    return config
