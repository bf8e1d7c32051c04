import jax
import numpy as np
import optax

from zoo import kit

NAME = "stochastic weight averaging without bn_update"
CAUSE = "Averaged weights were never run, so the stored statistics are those of other weights."
SOURCE = "https://github.com/timgaripov/swa/issues/7"
FINDS = ("stale",)


def linen(sick):
    start, weights = kit.healthy(), []
    kit.fit(start=start, tx=optax.sgd(1.0), watch=weights.append)
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *weights[9::10])
    patient = start.but(params=mean)
    return patient if sick else patient.recomputed()
