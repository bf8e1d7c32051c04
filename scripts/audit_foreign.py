"""Audits a ResNet-18 that does not use bnjax, trained correctly and with faults.

    python scripts/audit_foreign.py --data-dir FOLDER

The network is that of tests/foreign.py at a quarter of its width, which does not import bnjax. It
is trained for 100 steps of 128 CIFAR-10 images, by SGD with a momentum of 0.9, a learning rate that
falls from 0.05 to 0 along a cosine, and weight decay on kernels only. The same weights are audited

    right       as they are,
    forgotten   with averages that training never carried forward,
    train=True  evaluated with the statistics of each batch,
    averaged    as the average of the weights of about the last 50 steps, with statistics that were
                not recomputed for it,
    slow        with running averages with a momentum of 0.999 instead of 0.9,

and the last two again without facts about training.

Prints each audit with the test accuracy under stored and under precise statistics.
"""

import argparse
import dataclasses
import functools
import sys
import time
from pathlib import Path

import jax
import optax
import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from foreign import ResNet

from bnjax.clinic import Run, audit, linen
from bnjax.clinic.statistics import precise
from bnjax.commands.audit import audit_batches
from bnjax.data import datasets
from bnjax.data.batches import TrainRows, eval_batches, take
from bnjax.metrics import Metrics
from bnjax.train.cpu import compiler_options, prepare
from bnjax.train_step import eval_step, forward, init_state, train_step
from bnjax.types import fingerprint

STEPS, BATCH, RATE, AVERAGE = 100, 128, 0.05, 0.98


def train(model, tx, split, jit):
    """Returns the weights, their running statistics, and the average of the weights."""
    state, stats = init_state(model, tx, jax.random.key(0), split.image[:1])
    step = jit(functools.partial(train_step, model=model, tx=tx))
    average = state.params
    rows = TrainRows(len(split), BATCH, seed=0)
    for batch in tqdm.tqdm([take(split, rows(step)) for step in range(STEPS)], disable=None):
        state, stats, metrics = step(state, stats, batch)
        average = optax.incremental_update(state.params, average, 1 - AVERAGE)
    print(f"  last batch: {metrics.means()}")
    return state.params, stats, average


def main():
    """Trains twice and audits the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True, help="where CIFAR-10 lies")
    parser.add_argument("--width", type=int, default=16, help="64 is ResNet-18 (default: 16)")
    args = parser.parse_args()
    prepare()
    data = datasets.load("cifar10", args.data_dir)
    jit = functools.partial(jax.jit, compiler_options=compiler_options())
    tx = optax.chain(
        optax.add_decayed_weights(5e-4, lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.sgd(optax.cosine_decay_schedule(RATE, STEPS), momentum=0.9),
    )
    model = ResNet(width=args.width)
    slow = model.clone(momentum=0.999)
    began = time.perf_counter()
    params, stats, average = train(model, tx, data.train, jit)
    print(f"  {time.perf_counter() - began:.0f} s of training, {data.label}")
    slow_params, slow_stats, _ = train(slow, tx, data.train, jit)
    _, untouched = init_state(model, tx, jax.random.key(0), data.train.image[:1])
    evaluate = {
        train: jit(functools.partial(forward, model=model, train=train)) for train in (False, True)
    }

    def predict(train):
        return lambda images: evaluate[train](params, stats, {"image": images})[0]

    known = Run(STEPS, BATCH, fingerprint(params), tx)
    cases = {
        "right": (model, params, stats, dataclasses.replace(known, predict=predict(False))),
        "forgotten": (model, params, untouched, known),
        "train=True": (model, params, stats, dataclasses.replace(known, predict=predict(True))),
        "averaged": (model, average, stats, known),
        "averaged, nothing known": (model, average, stats, None),
        "slow": (slow, slow_params, slow_stats, dataclasses.replace(known, weights=None)),
        "slow, nothing known": (slow, slow_params, slow_stats, None),
    }
    batches = audit_batches(data.train, BATCH, 2048)
    test = [*eval_batches(data.test.image, data.test.label, 500)]
    for name, (net, weights, statistics, run) in cases.items():
        began = time.perf_counter()
        findings = audit(linen(net, weights, statistics), batches, run, jit=jit)
        seconds = time.perf_counter() - began
        step = jit(functools.partial(eval_step, model=net))
        exact = precise(linen(net, weights, statistics), batches, jit=jit).batch_stats
        accuracy = [
            functools.reduce(Metrics.merge, [step(weights, of, batch) for batch in test]).means()
            for of in (statistics, exact)
        ]
        print(f"\n{'=' * 100}\n{name} ({seconds:.0f} s)\n\n{findings}")
        print(
            "test accuracy: stored {:.3f}, precise {:.3f}".format(
                *(a["accuracy"] for a in accuracy)
            )
        )


if __name__ == "__main__":
    main()
