import numpy as np
import optax

from zoo import kit

NAME = "padding counted in the statistics"
CAUSE = "The mask of padded batches does not reach the norm: rows of zeros enter mean and variance."
SOURCE = "https://github.com/keras-team/keras/pull/20815"
FINDS = ("stale",)


def linen(sick):
    mask = np.arange(kit.SIZE) < 40

    def loss(params, stats, batch, key, model):
        logits, written = model.apply(
            {"params": params, "batch_stats": stats},
            batch["image"] * mask[:, None, None, None],
            True,
            None if sick else mask,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return (losses * mask).sum() / mask.sum(), written["batch_stats"]

    return kit.fit(loss=loss)
