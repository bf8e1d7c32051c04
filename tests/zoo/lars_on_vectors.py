import jax
import optax

from zoo import kit

NAME = "layer-wise learning rates for scale and bias"
CAUSE = "LARS scales the step of a bias by its norm; one that starts at 0 hardly moves."
SOURCE = "https://github.com/Spijkervet/SimCLR/issues/27"
FINDS = ("layerwise-rate",)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def linen(sick):
    ratio = True if sick else matrices
    return kit.fit(tx=optax.lars(1.0, weight_decay_mask=matrices, trust_ratio_mask=ratio))
