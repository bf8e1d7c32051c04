"""Fine-tuning with frozen statistics is better in small batches, but not in large ones.

    bnjax train --config bn --workdir runs/frozen_source --config.data.classes=0,1,2,3,4 \
        --config.model.filters=8,12,16 --config.model.dense=64,32 --config.model.momentum=0.9 \
        --config.train.batch_size=128 --config.train.epochs=4 --config.train.shuffle=True
    bnjax compare --claim configs/claims/frozen.py --workdir runs/frozen

Source: Wu & Johnson 2021 (arXiv 2105.07576, sections 3 and 4): statistics of small batches are
    noisy and differ between training and evaluation, unlike frozen statistics. By default,
    Detectron2 uses FrozenBatchNorm2d to fine-tune detectors from ImageNet weights with few images
    per device. Training with frozen statistics and evaluating with precise statistics of the new
    data makes training and evaluation inconsistent in another way.
Margin: 0.02, both where a difference is claimed and where equality is claimed. This is bnjax's own
    choice, because the sources measure other networks and data.
Time: 11 minutes for 45 runs on two busy cores of an AMD EPYC, after 35 seconds for the first
    command.
The first command trains a small network on five classes of CIFAR-10. The comparison fine-tunes it
for the other five classes with three kinds of statistics: updated, frozen, and frozen in training
but precise in evaluation. Batches have 2, 16 or 128 images. All variants train for the same number
of epochs, with learning rates proportional to the square root of the batch size. The network has
ten outputs throughout. The first choice, learning rates proportional to the batch size, made all
frozen networks with 128 images diverge within 13 steps, because nothing bounds activations that are
normalised with frozen statistics.
"""

SIZES = (2, 16, 128)
WAYS = {
    "updated": {},
    "frozen": {"train.freeze": "statistics"},
    "precise": {"train.freeze": "statistics", "eval.statistics": "precise"},
}


def get_claim():
    detectron = "Detectron2's default for detectors; Wu & Johnson 2021, sections 3 and 4"
    accuracy = {"quantity": "test_accuracy", "at": "last"}
    rates = {
        size: {"train.batch_size": size, "optimizer.learning_rate": 0.000625 * (size / 2) ** 0.5}
        for size in SIZES
    }
    return {
        "question": "Should statistics be frozen in fine-tuning for other classes?",
        "variants": {
            f"{way}_{size}": ("../bn.py", own | rates[size])
            for size in SIZES
            for way, own in WAYS.items()
        },
        "statements": [
            {
                **accuracy,
                "of": "frozen_2",
                "against": "updated_2",
                "direction": "greater",
                "margin": 0.02,
                "source": detectron,
            },
            {
                **accuracy,
                "of": "frozen_128",
                "against": "updated_128",
                "direction": "equal",
                "margin": 0.02,
                "source": "bnjax: batch statistics of 128 images are accurate",
            },
            {
                **accuracy,
                "of": "precise_2",
                "against": "frozen_2",
                "direction": "less",
                "margin": 0.02,
                "source": "Wu & Johnson 2021, section 4: training and evaluation have to agree",
            },
            {
                **accuracy,
                "of": "precise_128",
                "against": "frozen_128",
                "direction": "less",
                "margin": 0.02,
                "source": "Wu & Johnson 2021, section 4: training and evaluation have to agree",
            },
        ],
        "seeds": 5,
        "small": None,
        "full": {
            "data.classes": (5, 6, 7, 8, 9),
            "data.train_images": 5000,
            "model.filters": (8, 12, 16),
            "model.dense": (64, 32),
            "model.momentum": 0.9,
            "train.from": "runs/frozen_source",
            "train.steps": 0,
            "train.epochs": 4.0,
            "train.shuffle": True,
            "eval.every_epochs": 4.0,
            "optimizer.name": "sgd",
            "optimizer.momentum": 0.9,
        },
    }
