"""Averages that are too slow spoil evaluation; correcting for their initial values restores it.

    bnjax compare --claim configs/claims/momentum.py --workdir runs/momentum
    bnjax compare --claim configs/claims/momentum.py --workdir runs/momentum_full --full

Source: the tutorial, in which 0.99 was tried first and gave bad test results. After 100 steps the
    initial values have a weight of 0.99**100 = 37 %, and after 20 steps 82 %. It follows that
    correcting for these values restores evaluation. The claim that the mean over all batches lags
    behind the weights is bnjax's own conjecture.
Time: 7 minutes for the 25 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: in test loss, 0.5 early in training, where chance level is 2.3, and 0.1 late; the source has
    no numbers.
The variant with the mean over all batches uses a momentum of 0.9999 with debiasing. Over 100 steps,
this gives all batches the same weight to within 1 %.
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
