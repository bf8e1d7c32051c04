"""Dropout after the hidden dense layers, not followed by BN (a variant in the third notebook).

    python -m bnjax.main --config configs/dropout_bn_last.py

Time: 18 minutes on two 2.4 GHz AVX2 cores with huge pages (see docs/performance.md), 457 images/s.
Expected: the training loss is 0.73 at step 100. The test accuracy is 0.402 at step 20, 0.568 at
    step 60, and 0.617 at step 100, where the test loss is 1.12. One run with seed 0 on CIFAR-10
    (JPEG), that is, images recompressed as JPEG (quality 75). The variation across seeds was not
    measured.
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.model.dropout = (0.4, 0.5)
    config.model.norm_dense = (False, False)
    return config
