"""BN makes training faster, and allows learning rates that are 5 and 30 times higher.

    bnjax compare --claim configs/claims/learning_rates.py --workdir runs/learning_rates
    bnjax compare --claim configs/claims/learning_rates.py --workdir runs/learning_rates_full --full

Source: Ioffe & Szegedy 2015 (arXiv 1502.03167, section 4.2 and figure 3): an accuracy of 72.2 %
    takes 31.0 million steps without BN, 13.3 million with BN, 2.1 million with BN and five times
    the learning rate, and 2.7 million with thirty times the rate. Without BN, five times the rate
    made the parameters diverge.
Time: 7 minutes for the 30 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: half of each published factor, on the log scale: 1.5 and 2.5. Where the source only reports
    a failure, 0.05 in test accuracy. In the source, five times the rate was combined with less
    regularization, a faster decay of the rate and other changes, so 2.5 is a strict margin.
As in the source, the optimizer is SGD with momentum. Non-finite steps are dropped. The comparison
measures the number of steps to a training loss, not to a validation accuracy.
"""

from bnjax.compare.grid import SMALL

RATE = 0.01


def get_claim():
    paper = "Ioffe & Szegedy 2015, section 4.2"
    variants = {
        f"{name}_x{factor}": (f"../{name}.py", {"optimizer.learning_rate": RATE * factor})
        for factor in (1, 5, 30)
        for name in ("bn", "no_bn")
    }
    sgd = {
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "train.on_nonfinite": "skip",
        "train.most_skipped": 10**6,
        "train.shuffle": True,
    }
    steps = {"quantity": "steps_to_loss", "at": 1.4, "direction": "greater"}
    fails = {"quantity": "test_accuracy", "at": "last", "direction": "greater", "margin": 0.05}
    return {
        "question": "Does batch normalization make higher learning rates possible?",
        "variants": variants,
        "statements": [
            {
                **steps,
                "of": "no_bn_x1",
                "against": "bn_x1",
                "margin": 1.5,
                "source": f"{paper}: 31.0 and 13.3 million steps",
            },
            {
                **steps,
                "of": "bn_x1",
                "against": "bn_x5",
                "margin": 2.5,
                "source": f"{paper}: 13.3 and 2.1 million steps",
            },
            {
                **fails,
                "of": "bn_x5",
                "against": "no_bn_x5",
                "source": f"{paper}: without BN the parameters went to infinity",
            },
            {**fails, "of": "bn_x30", "against": "no_bn_x30", "source": f"{paper}: 74.8 % with BN"},
        ],
        "seeds": 5,
        "small": {
            **SMALL,
            **sgd,
            "train.batch_size": 250,
            "train.steps": 240,
            "eval.every_epochs": 4.0,
        },
        "full": {**sgd, "train.batch_size": 500, "train.steps": 2000},
    }
