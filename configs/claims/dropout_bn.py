"""With dropout, more BN after dense layers speeds up early learning but ends slightly worse.

    bnjax compare --claim configs/claims/dropout_bn.py --workdir runs/dropout_bn
    bnjax compare --claim configs/claims/dropout_bn.py --workdir runs/dropout_bn_full --full

Source: the tutorial's third notebook, which follows Li et al. 2018 (arXiv 1801.05134): after 20
    steps, the test accuracy is .523 with BN after dropout and .422 without; after 100 steps, it is
    .609 and .620.
Time: 5 minutes for the 10 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: 0.05 for the early difference, which is half of it; 0 for the late difference, which the
    source calls slight.
"""

from bnjax.compare.grid import SMALL


def get_claim():
    arms = {
        "quantity": "test_accuracy",
        "of": "before_dropout_only",
        "against": "after_dropout_too",
    }
    notebook = "github.com/ilango100/cifar, third notebook"
    return {
        "question": "Should batch normalization follow dropout?",
        "variants": {
            "after_dropout_too": ("../dropout_bn.py", {}),
            "before_dropout_only": ("../dropout_bn_last.py", {}),
        },
        "statements": [
            {
                **arms,
                "at": "first",
                "direction": "less",
                "margin": 0.05,
                "source": f"{notebook}: .422 and .523 after 20 steps",
            },
            {
                **arms,
                "at": "last",
                "direction": "greater",
                "margin": 0.0,
                "source": f"{notebook}: .620 and .609 after 100 steps",
            },
        ],
        "seeds": 5,
        "small": {**SMALL, "model.dense": (256, 64)},
        "full": {"train.steps": 100},
    }
