import jax
import numpy as np

from zoo import kit

NAME = "dead channels in a public checkpoint"
CAUSE = "Kernels that have decayed to 0 leave channels with a variance of 1e-14."
SOURCE = "https://github.com/Cadene/pretrained-models.pytorch/issues/99"
FINDS = ("dead-channels",)


def linen(sick):
    patient = kit.healthy()
    params = jax.tree.map(np.copy, patient.network.params)
    params["dense1"]["kernel"][:, :4] *= 1e-7 if sick else 1
    return patient.but(params=params).recomputed()
