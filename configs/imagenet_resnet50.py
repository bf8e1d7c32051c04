"""ResNet-50 for ImageNet as published (Goyal et al., 2017, arXiv 1706.02677): 90 epochs of SGD.

    python -m bnjax.main --config configs/imagenet_resnet50.py --config.data.dir=FOLDER

    FOLDER contains train/CLASS/*.JPEG and val/CLASS/*.JPEG, as usual for PyTorch. For a copy
    prepared by TensorFlow Datasets as array_record, add --config.data.name=imagenet2012.

Time: not measured. A model predicts 9 hours on 8 TPU v5e and 2.3 hours on 8 H100, with 1.7 and 1.9
    GiB per chip (`scripts/scaling.py --network resnet50`). These times require reading 3,500 and
    14,000 images per second; one image takes 2 ms on one core (`scripts/bench_stream.py feed`).
Expected: not measured. The paper has a top-1 error of 23.60 % (standard deviation .12 over five
    runs) with 256 images per step, and of 23.74 % (.09) with 8,192 images per step and warm-up,
    that is, accuracies of 0.764 and 0.763.

With 8 devices, batch norms normalise over 32 images, as in the paper; to normalise over all images
in a step, add --config.model.statistics_over=global. For N images per step, set
--config.train.batch_size=N and --config.optimizer.learning_rate=0.1*N/256.

Differences from the paper: the learning rate rises from 0 instead of 0.1 (the paper has no warm-up
with 256 images); the last layer is initialised with LeCun's scheme instead of a standard deviation
of 0.01; large JPEG files are decoded at a fraction of their size; each evaluation uses precise
statistics.
"""

from bnjax.train.config import default_config


def get_config():
    config = default_config()
    config.data.update(
        name="folder",
        pipeline="stream",
        image_size=224,
        shorter_side=256,
        crop="random_resized",
        workers=8,
    )
    config.augment.update(flip="random")
    config.model.update(
        name="resnet50",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        placement="before",
        momentum=0.9,
        epsilon=1e-5,
        statistics_over="per_device",
        dtype="auto",
    )
    config.optimizer.update(
        name="sgd",
        learning_rate=0.1,
        momentum=0.9,
        nesterov=True,
        schedule="steps",
        drops=(30 / 90, 60 / 90, 80 / 90),
        warmup=5 / 90,
        weight_decay=1e-4,
    )
    config.train.update(epochs=90.0, steps=0, batch_size=256, shuffle=True)
    config.eval.update(every_epochs=5.0, batch_size=256, statistics="precise")
    config.checkpoint.update(every_minutes=30.0)
    return config
