import dataclasses
import functools

import numpy as np

from zoo import kit

NAME = "features smaller than epsilon allows"
CAUSE = "Features of standard deviation 1e-3 or less are hardly normalised with an epsilon of 1e-3."
SOURCE = "https://github.com/tensorflow/tensorflow/issues/33027"
FINDS = ("epsilon-large",)


def linen(sick):
    of = kit.examples()
    of = of | {"image": of["image"] * np.float32(0.01 if sick else 1)}
    model = kit.Net(norm=functools.partial(kit.norm, epsilon=1e-3))
    patient = kit.fit(model, seen=kit.batches(150, of=of))
    return dataclasses.replace(patient, batches=kit.audited(of=of))
