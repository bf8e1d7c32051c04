import jax
import optax

from zoo import kit

NAME = "weight decay on scale and bias"
CAUSE = "The optimizer decays all parameters, those of the norms too."
SOURCE = "https://github.com/Eric-mingjie/rethinking-network-pruning/issues/27"
FINDS = ("weight-decay",)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def linen(sick):
    return kit.fit(tx=optax.adamw(3e-3, weight_decay=1e-2, mask=None if sick else matrices))
