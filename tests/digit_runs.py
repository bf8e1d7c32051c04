"""Short runs of real digits, by a small network."""

from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train.loop import train_and_evaluate

STEPS = 40


def train(workdir, steps=STEPS, **model):
    config = default_config()
    config.data.name = "digits"
    config.model.update(filters=(4,), kernels=(3,), strides=(3,), dense=(16,), norm_dense=(True,))
    config.model.update(dropout=(0.0,), placement="before", **model)
    config.train.steps, config.train.batch_size, config.train.shuffle = steps, 64, True
    config.eval.every_steps, config.eval.every_epochs = steps // 2, 0.0
    config.eval.histograms = config.eval.pictures = config.eval.gap_images = 0
    train_and_evaluate(config, workdir, build.dataset(config))
    return workdir
