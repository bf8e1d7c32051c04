import functools

import jax
import numpy as np

from zoo import kit

NAME = "statistics of each replica its own"
CAUSE = (
    "Replicas share gradients but not statistics; what is saved or validated depends on the "
    "replica."
)
SOURCE = "https://github.com/huggingface/pytorch-image-models/issues/110"
FINDS = ("replicas-differ",)


def linen(sick):
    norm = kit.norm if sick else functools.partial(kit.norm, axis_name="replicas")
    model = kit.Net(norm=norm)

    def of_replica(stats, batch, params, key):
        return kit.loss(params, stats, batch, key, model=model)

    def loss(params, stats, batch, key, model):
        parts = jax.tree.map(lambda leaf: leaf.reshape(2, -1, *leaf.shape[1:]), batch)
        each = jax.vmap(of_replica, (0, 0, None, None), axis_name="replicas")
        losses, stats = each(stats, parts, params, key)
        return losses.mean(), stats

    start = kit.fit(model, seen=[])
    stats = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), start.network.batch_stats)
    return kit.fit(model, loss, start=start.but(batch_stats=stats))
