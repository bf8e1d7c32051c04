"""The code shared by all cases and libraries: networks, batches and the audit."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

from bnjax import clinic

STEPS, SIZE, CLASSES = 60, 64, 4
_COMPILED: dict[Any, Any] = {}


def shared_jit(function):
    """`jax.jit` that compiles what an audit computes once for all patients of one model."""
    key = (function.func, *sorted(function.keywords.items(), key=lambda item: item[0]))
    return _COMPILED.setdefault(key, jax.jit(function))


audit, precise = (functools.partial(of, jit=shared_jit) for of in (clinic.audit, clinic.precise))


@dataclasses.dataclass(frozen=True, eq=False)
class Patient:
    """What an audit takes.

    In torch, `network` is a module, `before` the one before a fine-tuning, and `like` the linen
    network to port them into, if not that of `kit_linen`.
    """

    network: Any
    batches: Sequence[Any]
    run: clinic.Run
    like: Any = None
    before: Any = None

    def having(self, **changes: Any) -> "Patient":
        return dataclasses.replace(self, **changes)

    def but(self, **changes: Any) -> "Patient":
        return self.having(network=dataclasses.replace(self.network, **changes))

    def knowing(self, **changes: Any) -> "Patient":
        return self.having(run=dataclasses.replace(self.run, **changes))

    def recomputed(self) -> "Patient":
        return self.having(network=precise(self.network, self.batches))


def trained(network, seen, tx=None, start=None, **run):
    """Returns a patient with the facts that a user knows about the training."""
    size = len(seen[0]["label"]) if seen else SIZE
    steps = len(seen) + (start.run.steps if start else 0)
    run = {"steps": steps, "batch_size": size, "tx": tx} | run
    return Patient(network, audited(size), clinic.Run(**run))


@functools.cache
def ids(patient):
    """Returns the findings of bnjax's audit."""
    if hasattr(patient.network, "state_dict"):
        from zoo import kit_torch

        patient = kit_torch.ported(patient)
    return audit(patient.network, patient.batches, patient.run).ids


@functools.cache
def examples(offset=0.0):
    """Noise with a bright row, float32 from `offset` to 1 more; which row is the label."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, 512).astype(np.int32)
    image = rng.uniform(0, 0.5, (512, 8, 8, 1)).astype(np.float32)
    image[np.arange(512), label * 2] += 0.12
    return {"image": image + np.float32(offset), "label": label}


def batches(count=STEPS, size=SIZE, seed=1, of=None):
    """Batches in random order, epoch after epoch."""
    of, rng = of or examples(), np.random.default_rng(seed)
    n = len(of["label"])
    order = np.concatenate([rng.permutation(n) for _ in range(-(-count * size // n))])
    rows = order[: count * size].reshape(count, size)
    return [{name: leaf[one] for name, leaf in of.items()} for one in rows]


def audited(size=SIZE, of=None):
    """Other batches of the same examples."""
    return batches(max(6, 96 // size), size, seed=7, of=of)


def sgd(rate=0.05, steps=STEPS):
    return optax.sgd(optax.cosine_decay_schedule(rate, max(1, steps)), momentum=0.9)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def predicting(network, *, train):
    evaluate = jax.jit(functools.partial(type(network).run, train=train))
    return lambda images: evaluate(network, {"image": images})[0]


def mean_of(trees):
    return jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *trees)
