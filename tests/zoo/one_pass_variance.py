import dataclasses
import functools

from zoo import kit

NAME = "variance in one pass, far from 0"
CAUSE = "E[x^2] - E[x]^2 loses its digits, and may be negative, where the mean is large."
SOURCE = "https://github.com/google/flax/issues/1491"
FINDS = ("low-precision",)


def linen(sick):
    norm = functools.partial(kit.norm, momentum=0.9, use_fast_variance=sick)
    seen = kit.batches(200, of=kit.examples() | {"image": kit.examples()["image"] + 100})
    patient = kit.fit(kit.Net(norm=norm), seen=seen, tx=kit.sgd(0.01, 200))
    return dataclasses.replace(patient, batches=seen[:6])


def nnx(sick):
    from zoo import kit_nnx

    norm = functools.partial(kit_nnx.norm, use_fast_variance=sick)
    seen = kit.batches(200, of=kit.examples() | {"image": kit.examples()["image"] + 100})
    patient = kit_nnx.fit(kit_nnx.Net(norm), seen=seen, tx=kit.sgd(0.01, 200))
    return dataclasses.replace(patient, batches=seen[:6])
