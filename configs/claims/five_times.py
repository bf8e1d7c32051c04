"""Batch normalization reaches the same training loss in a fifth of the steps.

    bnjax compare --claim configs/claims/five_times.py --workdir runs/five_times

Source: the tutorial (see docs/results.md): a training loss of about 0.2 after about 350 steps
    without BN and about 70 steps with BN, one run each.
Time: 4.1 hours for six runs on two busy 2.4 GHz AVX2 cores. There is only a full version: up to 600
    steps of 5,000 images; each run ends when it reaches that loss.
Found: 76, 68 and 64 steps with BN, and 367, 336 and 424 steps without, on CIFAR-10 (JPEG): images
    recompressed as JPEG (quality 75).
Margin: "about 350" and "about 70" are each taken to be accurate to an eighth, so that their ratio
    is accurate to a factor of 1.25.
"""


def get_claim():
    tutorial = "github.com/ilango100/cifar, the tutorial: about 350 steps without BN, about 70 with"
    steps = {
        "quantity": "steps_to_loss",
        "at": 0.2,
        "of": "no_bn",
        "against": "bn",
        "source": tutorial,
    }
    return {
        "question": "Is training five times faster with batch normalization?",
        "variants": {"bn": ("../bn.py", {}), "no_bn": ("../no_bn.py", {})},
        "statements": [
            {**steps, "direction": "greater", "margin": 1},
            {**steps, "direction": "equal", "margin": 1.25, "expected": 5},
        ],
        "seeds": 3,
        "full": {"train.steps": 600, "train.stop_at_loss": 0.2},
    }
