import dataclasses

import numpy as np

from zoo import kit

NAME = "pixels divided by 255 twice"
CAUSE = (
    "The evaluation divides by 255, and the network does it again: the statistics are of other "
    "inputs."
)
SOURCE = "https://github.com/Priyanshu-byte-coder/devtrack/issues/927"
FINDS = ("stale",)


def linen(sick):
    patient = kit.healthy()
    scale = 255 if sick else 1
    seen = [batch | {"image": batch["image"] / np.float32(scale)} for batch in patient.batches]
    return dataclasses.replace(patient, batches=seen)
