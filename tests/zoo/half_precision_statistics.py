import jax
import jax.numpy as jnp

from zoo import kit

NAME = "statistics converted to half precision"
CAUSE = "Converting the whole network to half precision rounds its statistics too."
SOURCE = "https://github.com/NVIDIA/apex/pull/144"
FINDS = ("low-precision",)


def linen(sick):
    patient = kit.healthy()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), patient.network.batch_stats)
    return patient.but(batch_stats=half) if sick else patient
