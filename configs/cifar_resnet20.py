"""ResNet-20 for CIFAR-10 as published (He et al., 2016): SGD for 64,000 steps of 128 images."""

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
