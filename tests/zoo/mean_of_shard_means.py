import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from zoo import kit

NAME = "mean of the means of unequal shards"
CAUSE = (
    "Shards with different numbers of real examples: the mean over shards weights each shard alike."
)
SOURCE = "https://github.com/google/flax/issues/2417"
FINDS = ("stale",)
REASON = (
    "training normalises by the same means; a shift of 0.14 standard deviations is "
    "less than a small batch's noise"
)
MISSED = {"linen": REASON}


def linen(sick):
    """A third of the images, all of one label, weighs half."""
    model = kit.Net(norm=functools.partial(kit.norm, axis_name="shards"))

    def loss(params, stats, batch, key, model):
        def of_shard(image, label, mask):
            logits, written = model.apply(
                {"params": params, "batch_stats": stats}, image, True, mask, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return (losses * mask).sum(), written["batch_stats"]

        first = jnp.argsort(batch["label"] != 0, stable=True)  # label 0 first: a shard of its own
        shards = {name: leaf[first].reshape(2, 32, *leaf.shape[1:]) for name, leaf in batch.items()}
        mask = np.arange(32) < np.array([[16 if sick else 32], [32]])
        each = jax.vmap(of_shard, axis_name="shards")
        losses, stats = each(shards["image"], shards["label"], mask)
        return losses.sum() / mask.sum(), jax.tree.map(lambda leaf: leaf[0], stats)

    return kit.fit(model, loss)
