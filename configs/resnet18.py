"""ResNet-18 for CIFAR-10 with the standard recipe: SGD, one cycle, crop, flip and cutout.

    python -m bnjax.main --config configs/resnet18.py

Time: not measured; the config is meant for an accelerator.
Expected: not measured. ResNet-20 (`--config.model.name=resnet20 --config.train.epochs=8`) took 50
    minutes on two busy AVX-512 cores of an AMD EPYC, and reached a test accuracy of 0.731 and a
    test loss of 0.792. One run with seed 0 on CIFAR-10 (JPEG), that is, images recompressed as JPEG
    (quality 75).
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.model.update(
        name="resnet18",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        placement="before",
        momentum=0.9,
        epsilon=1e-5,
        dtype="auto",
    )
    config.augment.update(flip="random", crop=4, cutout=8)
    config.optimizer.update(
        name="sgd",
        learning_rate=0.2,
        momentum=0.9,
        nesterov=True,
        schedule="one_cycle",
        warmup=0.3,
        weight_decay=5e-4,
    )
    config.train.update(epochs=30.0, steps=0, batch_size=512, shuffle=True, label_smoothing=0.1)
    config.eval.update(every_epochs=5.0)
    return config
