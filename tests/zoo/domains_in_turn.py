import dataclasses

import numpy as np

from zoo import kit

NAME = "batches of two domains in turn"
CAUSE = (
    "Each domain is normalised by itself in training; the averaged variance lacks the "
    "difference of their means."
)
SOURCE = "https://github.com/filaPro/visda2019/issues/1"
FINDS = ("stale",)


def linen(sick):
    of = kit.examples()
    both = [{**of, "image": of["image"] + shift} for shift in (0.0, 0.5)]
    mixed = {name: np.concatenate([one[name] for one in both]) for name in of}
    apart = [kit.batches(30, of=one) for one in both]
    in_turn = [batch for pair in zip(*apart, strict=True) for batch in pair]
    patient = kit.fit(seen=in_turn if sick else kit.batches(60, of=mixed))
    return dataclasses.replace(patient, batches=kit.audited(of=mixed))
