"""The tutorial's network without batch normalization, the baseline for comparisons.

    python -m bnjax.main --config configs/no_bn.py

Time: 63 minutes on two 2.4 GHz AVX2 cores with GLIBC_TUNABLES=glibc.malloc.hugetlb=1, computed from
    the speed of the steps without other load (530 images/s).
Expected: a training loss of 0.2 is reached at step 353. The test accuracy is 0.563 at step 100,
    0.625 at step 200, and 0.629 at step 400, where the test loss is 1.57. One run with seed 0 on
    CIFAR-10 (JPEG), that is, images recompressed as JPEG (quality 75). Three other runs, with seeds
    0 to 2, reached a training loss of 0.2 after 367, 336 and 424 steps (claims/five_times.py).
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.fallback = "digits"
    config.train.steps = 400
    config.model.norm = "none"
    return config
