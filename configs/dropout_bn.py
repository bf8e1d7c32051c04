"""Dropout after the hidden dense layers, followed by BN (a variant in the third notebook).

    python -m bnjax.main --config configs/dropout_bn.py

Time: 20 minutes on two 2.4 GHz AVX2 cores with huge pages (see docs/performance.md), 412 images/s.
Expected: the training loss is 0.26 at step 100. The test accuracy is 0.492 at step 20, 0.614 at
    step 60, and 0.606 at step 100, where the test loss is 1.42. One run with seed 0 on CIFAR-10
    (JPEG), that is, images recompressed as JPEG (quality 75). The variation across seeds was not
    measured.
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.model.dropout = (0.4, 0.5)
    return config
