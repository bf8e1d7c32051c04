"""Strided convolutions do as well as pooling.

    bnjax compare --claim configs/claims/pooling.py --workdir runs/pooling
    bnjax compare --claim configs/claims/pooling.py --workdir runs/pooling_full --full

Source: Springenberg et al. 2015 (arXiv 1412.6806, table 3), which the tutorial follows: on CIFAR-10
    their model C has an error of 9.74 % with max pooling and 10.19 % with strides; in models A and
    B, strides increase the error by 0.99 and 0.78 points.
Time: 7 minutes for the 10 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: 0.02 in test accuracy; the published difference is 0.0045.
"""

from bnjax.compare.grid import SMALL


def get_claim():
    return {
        "question": "Does a stride do as well as pooling?",
        "variants": {"stride": ("../bn.py", {}), "pooling": ("../pooling.py", {})},
        "statements": [
            {
                "quantity": "test_accuracy",
                "at": "last",
                "of": "stride",
                "against": "pooling",
                "direction": "equal",
                "margin": 0.02,
                "source": "Springenberg et al. 2015, table 3: errors of 10.19 and 9.74 % on "
                "CIFAR-10",
            }
        ],
        "seeds": 5,
        "small": SMALL,
        "full": {"train.steps": 100},
    }
