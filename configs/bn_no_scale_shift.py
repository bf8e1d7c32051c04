"""BN that only normalises, with neither scale nor shift (a variant in the second notebook).

    python -m bnjax.main --config configs/bn_no_scale_shift.py

Time: 16 minutes on two 2.4 GHz AVX2 cores with huge pages (see docs/performance.md), 522 images/s.
Expected: a training loss of 0.2 is reached at step 76. The test accuracy is 0.495 at step 20, 0.598
    at step 60, and 0.562 at step 100, where the test loss is 1.72. One run with seed 0 on CIFAR-10
    (JPEG), that is, images recompressed as JPEG (quality 75). The variation across seeds was not
    measured.
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.model.use_scale = False
    config.model.use_bias = False
    return config
