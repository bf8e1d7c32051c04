"""BN before or after the activation, or at the input of every layer, makes little difference.

    bnjax compare --claim configs/claims/placement.py --workdir runs/placement
    bnjax compare --claim configs/claims/placement.py --workdir runs/placement_full --full

Source: a debate without figures for this network: Ioffe & Szegedy 2015 (arXiv 1502.03167, section
    3.2) place BN before the activation, and the tutorial after it.
Time: 6 minutes for the 15 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: 0.02 in the best test accuracy, bnjax's own choice.
"""

from bnjax.compare.grid import SMALL


def get_claim():
    best = {"quantity": "test_accuracy", "at": "best", "direction": "equal", "margin": 0.02}
    debate = (
        "a debate: Ioffe & Szegedy 2015, section 3.2, for before; github.com/ilango100/cifar for "
        "after, at every input"
    )
    return {
        "question": "Before or after the activation?",
        "variants": {
            "input": ("../bn.py", {}),
            "before": ("../bn_before_activation.py", {}),
            "after": ("../bn.py", {"model.placement": "after"}),
        },
        "statements": [
            {**best, "of": "before", "against": "after", "source": debate},
            {**best, "of": "input", "against": "after", "source": debate},
        ],
        "seeds": 5,
        "small": SMALL,
        "full": {"train.steps": 100},
    }
