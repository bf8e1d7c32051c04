import dataclasses

import jax
import numpy as np

from bnjax import clinic
from zoo import kit

NAME = "subnetwork cut out without calibration"
CAUSE = (
    "A narrower network with the weights of a wide one has other activations, and the wide "
    "one's statistics."
)
SOURCE = "https://github.com/mit-han-lab/once-for-all/issues/15"
FINDS = ("stale",)


def linen(sick):
    whole = kit.healthy()
    trees = whole.network.params, whole.network.batch_stats
    params, stats = jax.tree.map(np.copy, trees)
    for of in (params["dense0"], params["norm0"], stats["norm0"]):
        for name, leaf in of.items():
            of[name] = leaf[..., :8]
    params["dense1"]["kernel"] = params["dense1"]["kernel"][:8]
    patient = dataclasses.replace(whole, network=clinic.linen(kit.Net(width=8), params, stats))
    return patient if sick else patient.recomputed()
