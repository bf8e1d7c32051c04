import functools

import jax
import optax

from zoo import kit

NAME = "moving average of the weights without the statistics"
CAUSE = "The trainable variables are averaged; the statistics are those of the raw weights."
SOURCE = "https://github.com/huggingface/pytorch-image-models/issues/102"
FINDS = ("stale",)


def linen(sick):
    weights = []
    patient = kit.fit(tx=optax.sgd(0.5), watch=weights.append)
    average = functools.reduce(
        lambda old, new: jax.tree.map(lambda one, other: 0.98 * one + 0.02 * other, old, new),
        weights,
    )
    patient = patient.but(params=jax.device_get(average))
    return patient if sick else patient.recomputed()
