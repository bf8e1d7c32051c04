"""Scale and shift make no difference where the next layer can compensate for their absence.

    bnjax compare --claim configs/claims/scale_shift.py --workdir runs/scale_shift
    bnjax compare --claim configs/claims/scale_shift.py --workdir runs/scale_shift_full --full

Source: the tutorial's second notebook: after 400 steps, the test accuracy is .607 with both and
    .608 with neither, and the losses show no visible difference.
Time: 3 minutes for the 10 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: the accuracies of the two published runs differ by up to 0.043 during training (step 20) and
    by 0.001 at the end; 0.02 lies in between. 0.1 in training loss is bnjax's own choice.
"""

from bnjax.compare.grid import SMALL


def get_claim():
    arms = {"of": "neither", "against": "both", "direction": "equal"}
    notebook = "github.com/ilango100/cifar, second notebook"
    return {
        "question": "Do scale and shift make a difference?",
        "variants": {"both": ("../bn.py", {}), "neither": ("../bn_no_scale_shift.py", {})},
        "statements": [
            {
                **arms,
                "quantity": "test_accuracy",
                "at": "last",
                "margin": 0.02,
                "source": f"{notebook}: .608 and .607 after 400 steps",
            },
            {
                **arms,
                "quantity": "train_loss",
                "at": "last",
                "margin": 0.1,
                "source": f"{notebook}: no visible difference in the loss",
            },
        ],
        "seeds": 5,
        "small": SMALL,
        "full": {"train.steps": 400},
    }
