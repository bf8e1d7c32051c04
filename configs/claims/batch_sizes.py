"""BN needs large batches, batch renorm smaller ones; group and layer norm work with any size.

    bnjax compare --claim configs/claims/batch_sizes.py --workdir runs/batch_sizes
    bnjax compare --claim configs/claims/batch_sizes.py --workdir runs/batch_sizes_full --full

Source: Wu & He 2018 (arXiv 1803.08494, section 4.1), validation errors of ResNet-50 on ImageNet.
    With 32 images per worker: 23.6 % with batch norm, 24.1 % with group norm, 25.3 % with layer
    norm. With 2 images: 34.7 % with batch norm and 24.1 % with group norm. With 4 images: 27.3 %
    with batch norm and 26.3 % with batch renormalization (Ioffe 2017, arXiv 1702.03275).
Time: 10 minutes for the 80 runs of the small version, on two busy 2.45 GHz AVX2 cores; the full
    version is meant for a GPU and was not measured.
Margin: half of each published difference: 0.05 for group norm, 0.045 for layer norm and 0.005 for
    renorm with 2 images. With 512 images, batch and group norm count as equal if they differ by at
    most 0.02. This margin is bnjax's own choice, because figure 5 of the source ends at 32 images.
As in the source, the norm comes before the activation and the learning rate is proportional to the
batch size. All variants train for the same number of epochs. Small batches need slow averages
(0.99), and large batches, which take few steps, need averages without their initial values.
"""

from bnjax.compare.grid import SMALL

NORMS = ("batch", "group", "layer", "renorm")
SIZES = (2, 16, 128, 512)


def get_claim():
    paper = "Wu & He 2018, section 4.1"
    variants = {
        f"{norm}_{size}": (
            "../bn.py",
            {
                "model.norm": norm,
                "train.batch_size": size,
                "optimizer.learning_rate": 0.01 * size / 32,
            },
        )
        for size in SIZES
        for norm in NORMS
    }
    common = {
        "model.placement": "before",
        "model.momentum": 0.99,
        "model.debias": True,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "train.on_nonfinite": "skip",
        "train.most_skipped": 10**6,
        "train.shuffle": True,
        "train.steps": 0,
    }
    accuracy = {"quantity": "test_accuracy", "at": "last"}
    small_batch = {**accuracy, "against": "batch_2", "direction": "greater"}
    return {
        "question": "Which norms work with small batches?",
        "variants": variants,
        "statements": [
            {
                **small_batch,
                "of": "group_2",
                "margin": 0.05,
                "source": f"{paper}: errors of 24.1 and 34.7 %",
            },
            {
                **small_batch,
                "of": "layer_2",
                "margin": 0.045,
                "source": f"{paper}: errors of 25.3 (of 32 images) and 34.7 %",
            },
            {
                **small_batch,
                "of": "renorm_2",
                "margin": 0.005,
                "source": f"{paper}: errors of 26.3 and 27.3 % at 4 images; Ioffe 2017",
            },
            {
                **accuracy,
                "of": "group_512",
                "against": "batch_512",
                "direction": "equal",
                "margin": 0.02,
                "source": "bnjax; the paper's figure 5 ends at 32",
            },
        ],
        "seeds": 5,
        "small": {
            **SMALL,
            **common,
            "data.train_images": 2560,
            "train.epochs": 4.0,
            "eval.every_epochs": 4.0,
            "model.renorm_steps": 1000,
        },
        "full": {**common, "train.epochs": 10.0, "eval.every_epochs": 1.0},
    }
