"""Networks that are healthy, and for every finding of the audit one that has exactly that illness.

Each is a function of a seed that trains it, in a second or so.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from foreign import NETWORKS, ResNet
from zoo.kit import SIZE, STEPS, Patient, batches, predicting, sgd

from bnjax import norms
from bnjax.clinic import Run, linen
from bnjax.models.convnet import ConvNet
from bnjax.train_step import forward, init_state, train_step
from bnjax.types import fingerprint


class Plain(nn.Module):
    """Two dense layers with a norm each; every option is an illness to some value of it."""

    momentum: float = 0.9
    epsilon: float = 1e-5
    norm: Any = nn.BatchNorm
    offset: float = 0.0
    dropout: float = 0.0
    width: int = 16
    dtype: Any = None
    always_batch: bool = False

    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(
            self.norm,
            use_running_average=not (train or self.always_batch),
            momentum=self.momentum,
            epsilon=self.epsilon,
        )
        x = nn.Dense(self.width, dtype=self.dtype)(x.reshape(len(x), -1))
        x = nn.relu(norm(name="first")(x + jnp.asarray(self.offset, x.dtype)))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x = nn.relu(norm(name="second")(nn.Dense(self.width, dtype=self.dtype)(x)))
        return nn.Dense(10)(x)


def images(seed, n=512):
    """Noise with a bright row; which row is the label."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, n).astype(np.int32)
    image = rng.integers(0, 120, (n, 8, 8, 3), np.uint8)
    image[np.arange(n), label * 2] += 60
    return {"image": image, "label": label}


@functools.cache
def trained(model, seed=0, steps=STEPS, size=SIZE, rate=0.02):
    tx, of = sgd(rate, steps), images(seed)
    init = jax.jit(functools.partial(init_state, model, tx))
    state, stats = init(jax.random.key(seed), of["image"][:2])
    step = jax.jit(functools.partial(train_step, model=model, tx=tx))
    for batch in batches(steps, size, seed + 1, of):
        state, stats, _ = step(state, stats, batch)
    network = linen(model, *jax.device_get((state.params, stats)))
    run = Run(steps, size, fingerprint(network.params), tx, predicting(network, train=False))
    # The same images in another order.
    count = min(512 // size, max(6, 256 // size))
    return Patient(network, batches(count, size, seed + 7, of), run)


def given_to_first(network, batch):
    """The inputs [n, c] of the first norm in a `Plain`, in NumPy and float64."""
    dense = jax.tree.map(np.float64, network.params["Dense_0"])
    return batch["image"].reshape(len(batch["image"]), -1) / 255 @ dense["kernel"] + dense["bias"]


def changed(stats, name, function):
    """The statistics with a function applied to the mean or the variance of each norm."""
    return {norm: leaves | {name: function(leaves[name])} for norm, leaves in stats.items()}


def convnet(norm="batch", fields=(), **options):
    """A `ConvNet` with other fields, and a norm with options."""
    shape = {"filters": (4, 6), "kernels": (3, 3), "strides": (2, 1), "dense": (24,)}
    shape |= {"dropout": (0.0,), "norm_dense": (True,)} | dict(fields)
    return ConvNet(**shape, norm=norms.build(norm, **{"momentum": 0.9, "epsilon": 1e-3} | options))


def of(model, **options):
    return functools.partial(trained, model, **options)


plain, slow, dropped = of(Plain()), of(Plain(momentum=0.99)), of(Plain(dropout=0.5))
faster = of(Plain(momentum=0.8))
NEAR, FAR = (Plain(norm=norm, offset=1000.0) for norm in (nn.BatchNorm, norms.BatchNorm))


def frozen(seed, before):
    """Compares one norm of a network with the same norm before."""
    return plain(seed).knowing(before=before.network, frozen=("first",))


def step(passes):
    """A step with one or two passes through the network, of different images, that donates."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(network, batch):
        for i in range(passes):
            image = batch["image"][:: 1 - 2 * i] // (1 + i)
            variables = network.params, network.batch_stats, {"image": image}
            _, written = forward(*variables, model=network.model, train=True)
            network = network.replace(batch_stats=written["batch_stats"])
        return network

    return run


HEALTHY = {
    **{name: of(model) for name, model in NETWORKS.items() if name != "shared"},
    "plain": plain,
    "momentum 0.99, recomputed": lambda seed: slow(seed).recomputed(),
    "dropout before a norm, recomputed": lambda seed: dropped(seed).recomputed(),
    "plain, frozen and stepped": lambda seed: frozen(seed, plain(seed)).knowing(step=step(1)),
    "plain, batches of 256": of(Plain(), size=256),
    "plain, batches of 24": of(Plain(), size=24),
    "plain, 300 steps": of(Plain(), steps=300),
    "plain, our norm, far from 0": of(FAR, steps=300),
    "wide": of(Plain(width=256)),
    "resnet-18, width 4": of(ResNet(width=4)),
    "convnet": of(convnet()),
    "convnet, dropout behind the norms": of(convnet(fields={"dropout": (0.5,)})),
    "convnet, norm before": of(convnet(fields={"placement": "before"})),
    "convnet, norm after": of(convnet(fields={"placement": "after", "activation": nn.tanh})),
    "convnet, ghost": of(convnet("ghost", virtual_batch=32)),
    "convnet, renorm": of(convnet("renorm", renorm_steps=60)),
    "convnet, debias, unbiased": of(convnet(momentum=0.99, debias=True, variance="unbiased")),
    "convnet, bfloat16": of(convnet(fields={"dtype": jnp.bfloat16})),
}


def untold(patient):
    return patient.having(run=None)


def with_stats(change):
    return lambda seed: plain(seed).but(batch_stats=change(plain(seed).network.batch_stats))


def with_stat(name, function):
    return with_stats(lambda stats: changed(stats, name, function))


def first(value):
    return lambda leaf: np.concatenate([[np.float32(value)], leaf[1:]])


def noisy(stats):
    return changed(stats, "mean", lambda leaf: leaf + 0.02)


def dead(seed):
    params = dict(plain(seed).network.params)
    scale = params["second"]["scale"]
    params["second"] = params["second"] | {"scale": scale * (np.arange(scale.size) > 3)}
    return plain(seed).but(params=params).knowing(weights=None)


def stacked(stats):
    return jax.tree.map(lambda *leaves: np.stack(leaves), stats, noisy(stats))


def with_third(stats):
    return stats | {"third": stats["first"]}


def without_variance(stats):
    return stats | {"second": {"mean": stats["second"]["mean"]}}


def by_batch(seed):
    return plain(seed).knowing(predict=predicting(plain(seed).network, train=True))


def averaged(seed):
    """Weights of halfway between two trainings, with statistics of one of them."""
    both = plain(seed), trained(Plain(), seed, rate=0.3)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 2, *(one.network.params for one in both))
    return plain(seed).but(params=mean)


def optimized(make):
    return lambda seed: plain(seed).knowing(tx=make())


def initial(stats):
    return changed(changed(stats, "mean", np.zeros_like), "var", np.ones_like)


def in_bfloat16(stats):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), stats)


def lars():
    matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.lars(0.1, weight_decay=1e-3, weight_decay_mask=matrices)


# The id, and what has it.
ILL = {
    "no collection": ("missing-statistics", with_stats(lambda stats: {})),
    "a leaf too many": ("unmatched-leaves", with_stats(with_third)),
    "a leaf too few": ("unmatched-leaves", with_stats(without_variance)),
    "a leaf of another shape": ("unmatched-leaves", with_stat("mean", lambda leaf: leaf[:3])),
    "replicas in a list": ("replicas-differ", with_stats(lambda stats: [stats, noisy(stats)])),
    "replicas along an axis": ("replicas-differ", with_stats(stacked)),
    "never updated": ("never-updated", with_stats(initial)),
    "momentum 0.99": ("not-converged", slow),
    "momentum 0.99, untold": ("not-converged", lambda seed: untold(slow(seed))),
    "far from 0, 60 steps": ("not-converged", of(FAR)),
    "averaged weights": ("stale", averaged),
    "averaged weights, untold": ("stale", lambda seed: untold(averaged(seed))),
    "evaluated by the batch": ("batch-dependent", by_batch),
    "flag without effect": ("batch-dependent", of(Plain(always_batch=True))),
    "NaN": ("invalid-statistics", with_stat("mean", first(np.nan))),
    "negative variance": ("invalid-statistics", with_stat("var", first(-0.1))),
    "vanished variance": ("invalid-statistics", with_stat("var", first(0.0))),
    "scales of 0": ("dead-channels", dead),
    "far from 0 in bfloat16": ("low-precision", of(Plain(offset=64.0, dtype=jnp.bfloat16))),
    "far from 0, one-pass variance": ("low-precision", of(NEAR, steps=300)),
    "averages in bfloat16": ("low-precision", with_stats(in_bfloat16)),
    "epsilon of 10": ("epsilon-large", of(Plain(epsilon=10.0))),
    "AdamW on all": ("weight-decay", optimized(lambda: optax.adamw(1e-3))),
    "LARS on all": ("layerwise-rate", optimized(lars)),
    "dropout before a norm": ("variance-shift", dropped),
    "frozen in name": (
        "moved-while-frozen",
        lambda seed: frozen(seed, of(Plain(momentum=0.8))(seed)),
    ),
    "one norm, called twice": ("updated-twice", of(NETWORKS["shared"])),
    "two passes in a step": ("updated-twice", lambda seed: plain(seed).knowing(step=step(2))),
    "batches of 4": ("small-batch", of(Plain(), size=4)),
}
