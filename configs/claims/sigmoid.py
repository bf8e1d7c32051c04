"""With BN, even a network with sigmoid activations learns.

    bnjax compare --claim configs/claims/sigmoid.py --workdir runs/sigmoid
    bnjax compare --claim configs/claims/sigmoid.py --workdir runs/sigmoid_full --full

Source: Ioffe & Szegedy 2015 (arXiv 1502.03167, section 4.2.2): Inception with sigmoids stays at
    chance level without BN and reaches 69.8 % with BN and five times the learning rate.
Time: 3 minutes for the 10 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: 0.1 in test accuracy, where chance level is 0.1.
"""

from bnjax.compare.grid import SMALL


def get_claim():
    sigmoid = {"model.activation": "sigmoid", "model.placement": "before"}
    return {
        "question": "Can networks of sigmoids be trained with batch normalization?",
        "variants": {"bn": ("../bn.py", sigmoid), "no_bn": ("../no_bn.py", sigmoid)},
        "statements": [
            {
                "quantity": "test_accuracy",
                "at": "last",
                "of": "bn",
                "against": "no_bn",
                "direction": "greater",
                "margin": 0.1,
                "source": "Ioffe & Szegedy 2015, section 4.2.2: 69.8 % with BN, chance without",
            }
        ],
        "seeds": 5,
        "small": SMALL,
        "full": {"train.steps": 100},
    }
