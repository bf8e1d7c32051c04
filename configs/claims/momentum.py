"""Averages that are too slow spoil evaluation; leaving out their starting values mends that.

    bnjax compare --claim configs/claims/momentum.py --workdir runs/momentum
    bnjax compare --claim configs/claims/momentum.py --workdir runs/momentum_full --full

Source: the tutorial: 0.99 was tried first and gave bad test results; after 100 steps 0.99**100 = 37
    % of the starting values are left, after 20 steps 82 %. That leaving them out mends it follows;
    that the mean of all batches lags behind the weights is bnjax's own guess.
Time: 7 minutes for the small version, 25 runs, on two 2.45 GHz AVX2 cores beside other work; the
    full size is for a GPU and not measured.
Margin: in test loss. The source has no figures: 0.5 early, where chance is 2.3, and 0.1 late.
The mean of all batches is momentum 0.9999 without starting values, which over 100 steps weighs them
alike to a hundredth.
"""

from bnjax.compare.grid import SMALL


def get_claim():
    tutorial = "github.com/ilango100/cifar, the tutorial: bad test results with 0.99"
    own = "bnjax, stated before any run"
    early, late = ({"quantity": "test_loss", "at": at} for at in ("first", "last"))
    return {
        "question": "How slow may the running averages be?",
        "variants": {
            "0.75": ("../bn.py", {}),
            "0.9": ("../bn.py", {"model.momentum": 0.9}),
            "0.99": ("../bn.py", {"model.momentum": 0.99}),
            "0.99_debiased": ("../bn.py", {"model.momentum": 0.99, "model.debias": True}),
            "mean_of_all": ("../bn.py", {"model.momentum": 0.9999, "model.debias": True}),
        },
        "statements": [
            {
                **early,
                "of": "0.99",
                "against": "0.75",
                "direction": "greater",
                "margin": 0.5,
                "source": tutorial,
            },
            {
                **late,
                "of": "0.99",
                "against": "0.75",
                "direction": "greater",
                "margin": 0.1,
                "source": tutorial,
            },
            {
                **late,
                "of": "0.9",
                "against": "0.75",
                "direction": "equal",
                "margin": 0.1,
                "source": own,
            },
            {
                **early,
                "of": "0.99_debiased",
                "against": "0.99",
                "direction": "less",
                "margin": 0.5,
                "source": own,
            },
            {
                **late,
                "of": "0.99_debiased",
                "against": "0.99",
                "direction": "less",
                "margin": 0.1,
                "source": own,
            },
            {
                **late,
                "of": "mean_of_all",
                "against": "0.75",
                "direction": "greater",
                "margin": 0.0,
                "source": own,
            },
        ],
        "seeds": 5,
        "small": SMALL,
        "full": {"train.steps": 100},
    }
