"""ResNet-20 for CIFAR-10 as published (He et al., 2016): SGD for 64,000 steps of 128 images.

    python -m bnjax.main --config configs/cifar_resnet20.py

Time: not measured; the config is meant for an accelerator.
Expected: not measured. The paper has a test error of 8.75 %, that is, an accuracy of 0.9125. With a
    64th of the schedule (`--config.train.steps=1000`), one run had a test accuracy of 0.578 and a
    test loss of 1.175 after 749 steps, when the learning rate had been divided by 10 once. The run
    used seed 0 and CIFAR-10 (JPEG), that is, images recompressed as JPEG (quality 75), on two busy
    AVX-512 cores of an AMD EPYC. It was planned for 2,000 steps and shortened at step 502.

Differences from the paper: training uses all 50,000 images instead of 45,000; the mean of each
channel is subtracted instead of the mean of each pixel, and each channel is divided by its standard
deviation; the scale of the last norm in each block starts at 0.
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
