"""ResNet-20 for CIFAR-10 as published (He et al., 2016): SGD for 64,000 steps of 128 images.

    python -m bnjax.main --config configs/cifar_resnet20.py

Time: not measured; it is for an accelerator.
Expected: not measured. The paper has a test error of 8.75 %, an accuracy of 0.9125. A 64th of the
    schedule (`--config.train.steps=1000`) was at accuracy 0.578, loss 1.175, after 749 steps, with
    the rate divided by 10 once. One run, seed 0, on CIFAR-10 (JPEG): images recompressed as JPEG,
    quality 75; two AVX-512 cores of an AMD EPYC that had other work besides.

Different from the paper: all 50,000 training images instead of 45,000; the mean of each channel and
not of each pixel is subtracted, and each channel is divided by its deviation; the scale of the last
norm of each block starts at 0.
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.model.update(
        name="resnet20",
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        placement="before",
        momentum=0.9,
        epsilon=1e-5,
        dtype="auto",
    )
    config.augment.update(flip="random", crop=4)
    config.optimizer.update(
        name="sgd",
        learning_rate=0.1,
        momentum=0.9,
        schedule="steps",
        drops=(0.5, 0.75),
        weight_decay=1e-4,
        weight_decay_mask="all",
    )
    config.train.update(steps=64_000, batch_size=128, shuffle=True)
    config.eval.update(every_epochs=10.0)
    return config
