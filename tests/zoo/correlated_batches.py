import dataclasses

import numpy as np

from zoo import kit

NAME = "batches of examples that are alike"
CAUSE = "Each batch is of one recording: its variance lacks the differences between recordings."
SOURCE = "https://github.com/pytorch/pytorch/issues/4741"
FINDS = ("stale",)


def linen(sick):
    """Eight recordings of 64 images, each with a brightness of its own."""
    of, rng = kit.examples(), np.random.default_rng(3)
    light = rng.uniform(0, 2, (8, 1, 1, 1, 1)).astype(np.float32)
    image = of["image"].reshape(8, 64, 8, 8, 1) + light
    parts = [{"image": image[i], "label": of["label"].reshape(8, 64)[i]} for i in range(8)]
    mixed = {"image": image.reshape(512, 8, 8, 1), "label": of["label"]}
    alike = [parts[i] for i in rng.integers(0, 8, kit.STEPS)]
    patient = kit.fit(seen=alike if sick else kit.batches(kit.STEPS, of=mixed))
    return dataclasses.replace(patient, batches=kit.audited(of=mixed))
