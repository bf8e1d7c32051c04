"""Large batches generalise better if small parts of them are normalised separately.

    bnjax compare --claim configs/claims/ghost.py --workdir runs/ghost
    bnjax compare --claim configs/claims/ghost.py --workdir runs/ghost_full --full

Source: Hoffer et al. 2017 (arXiv 1705.08741, table 1): ResNet44 on CIFAR-10 with batches of 4,096
    and an adapted learning rate reaches 89.30 %, and 90.50 % with additional ghost batches of 128
    images.
Time: 4 minutes for the 10 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: half of the published difference, 0.006 in test accuracy.
bnjax evaluates with averages of the statistics of whole batches, whereas the paper averages the
statistics of the ghost batches.
"""

from bnjax.compare.grid import SMALL


def get_claim():
    return {
        "question": "Does ghost batch normalization help large batches?",
        "variants": {
            "whole_batch": ("../bn.py", {}),
            "ghost": ("../bn.py", {"model.norm": "ghost"}),
        },
        "statements": [
            {
                "quantity": "test_accuracy",
                "at": "last",
                "of": "ghost",
                "against": "whole_batch",
                "direction": "greater",
                "margin": 0.006,
                "source": "Hoffer et al. 2017, table 1: 90.50 and 89.30 %",
            }
        ],
        "seeds": 5,
        "small": {
            **SMALL,
            "train.batch_size": 1000,
            "train.steps": 60,
            "train.shuffle": True,
            "model.virtual_batch": 50,
        },
        "full": {"train.shuffle": True, "model.virtual_batch": 128},
    }
