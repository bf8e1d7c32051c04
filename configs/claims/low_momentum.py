"""The effect of the low momentum in the fast recipes, and of other settings of their norms.

    bnjax compare --claim configs/claims/low_momentum.py --workdir runs/low_momentum

Source: K. Jordan, 94 % on CIFAR-10 in 3.29 seconds, 2024, uses a momentum of 0.6 and a scale fixed
    at 1, without measuring the effect of either.
Time: 57 minutes for the 24 runs of the small version, on two busy AVX-512 cores; the full version
    is meant for a GPU and was not measured.
Margin: bnjax's own choice, in test accuracy: the possible difference between two seeds of the
    recipe, or twice that; 0.1 where the initial values keep a weight of two thirds.
The small version trains for two epochs on a fifth of the data, in 40 steps; the full version is the
recipe itself.
"""

SMALL = {
    "data.train_images": 10_000,
    "train.epochs": 2.0,
    "train.batch_size": 500,
    "train.label_smoothing": 0.2,
    "muon.whiten_steps": 15,
    "eval.every_epochs": 2.0,
    "eval.views": 1,
}


def get_claim():
    recipe = "../airbench94.py"
    own = "bnjax, stated before any run"

    def late(of, direction, margin, against="0.6"):
        return {
            "quantity": "test_accuracy",
            "at": "last",
            "of": of,
            "against": against,
            "direction": direction,
            "margin": margin,
            "source": own,
        }

    return {
        "question": "Which part of the fast recipe's batch norm matters?",
        "variants": {
            "0.6": (recipe, {}),
            "0.9": (recipe, {"model.momentum": 0.9}),
            "0.99": (recipe, {"model.momentum": 0.99}),
            "precise": (recipe, {"eval.statistics": "precise"}),
            "scale_trained": (recipe, {"model.use_scale": True}),
            "ghost_125": (recipe, {"model.norm": "ghost", "model.virtual_batch": 125}),
            "ghost_25": (recipe, {"model.norm": "ghost", "model.virtual_batch": 25}),
            "averages_bfloat16": (recipe, {"model.average_dtype": "bfloat16"}),
        },
        "statements": [
            late("0.99", "less", 0.1),
            late("0.9", "equal", 0.02),
            late("precise", "equal", 0.01),
            late("scale_trained", "equal", 0.01),
            late("ghost_125", "equal", 0.01),
            late("ghost_25", "less", 0.0),
            late("averages_bfloat16", "equal", 0.01),
        ],
        "seeds": 3,
        "small": SMALL,
        "full": {},
    }
