import optax

from zoo import kit

NAME = "averages that lag behind fast weights"
CAUSE = (
    "In the middle of a training with a high learning rate, slow averages are of weights long gone."
)
SOURCE = "https://arxiv.org/abs/2105.07576"
FINDS = ("stale",)


def linen(sick):
    patient = kit.fit(start=kit.healthy(), tx=optax.sgd(2.0), steps=40)
    return patient if sick else patient.recomputed()
