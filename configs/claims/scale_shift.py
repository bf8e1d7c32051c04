"""Scale and shift make no difference where the next layer can do the same.

    bnjax compare --claim configs/claims/scale_shift.py --workdir runs/scale_shift
    bnjax compare --claim configs/claims/scale_shift.py --workdir runs/scale_shift_full --full

Source: the tutorial's second notebook: test accuracy .607 with both and .608 with neither after 400
    steps, and losses that look alike.
Time: 3 minutes for the small version, 10 runs, on two 2.45 GHz AVX2 cores beside other work; the
    full size is for a GPU and not measured.
Margin: the two published runs are up to 0.043 apart in accuracy on the way (step 20) and 0.001 at
    the end; 0.02 is between. 0.1 in training loss is bnjax's own choice.
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
                "source": f"{notebook}: no visible difference to the loss",
            },
        ],
        "seeds": 5,
        "small": SMALL,
        "full": {"train.steps": 400},
    }
