import dataclasses
import functools

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


def nnx(sick):
    """With `dtype=bfloat16` the averages are cast before evaluation, whatever they are kept in."""
    from zoo import kit_nnx

    dtype = jnp.bfloat16 if sick else jnp.float32
    norm = functools.partial(kit_nnx.norm, dtype=dtype, use_fast_variance=False)
    seen = kit.batches(200, of=kit.examples() | {"image": kit.examples()["image"] + 100})
    patient = kit_nnx.fit(kit_nnx.Net(norm), seen=seen, tx=kit.sgd(0.01, 200))
    return dataclasses.replace(patient, batches=seen[:6])
