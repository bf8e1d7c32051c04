"""Runs one measurement of `scripts/bench.py` in a separate process; prints one JSON line.

    python scripts/bench_step.py train FOLDER BATCH STEPS [--model bnjax|textbook] [--norm none]
        [--dtype bfloat16] [--together 16] [--set KEY=VALUE]
    python scripts/bench_step.py evaluate FOLDER BATCH STEPS
    python scripts/bench_step.py matmul|blas - BATCH STEPS [--dtype bfloat16]

FOLDER holds CIFAR-10. The time is the median over all steps except the first two, in seconds; the
peak memory is that of the process.
"""

import argparse
import functools
import itertools
import json
import resource
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

from bnjax import norms
from bnjax.data import datasets
from bnjax.data.batches import TrainRows
from bnjax.data.feed import resident_feed
from bnjax.train import build
from bnjax.train.config import default_config
from bnjax.train.cpu import keep_freed_memory
from bnjax.train.dispatch import default_feed
from bnjax.train.matmul_library import fastest_options
from bnjax.train.parsing import override
from bnjax.train.steps import Steps, unstack
from bnjax.train_step import train_step

WARM_UP = 2


def timed(once: Callable[[], Any], times: int) -> list[float]:
    """Returns the seconds from each call until its result is ready."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(once())
        seconds.append(time.perf_counter() - began)
    return seconds


def bnjax_trainer(
    args: argparse.Namespace, data: datasets.Dataset
) -> tuple[Callable[[], Any], float]:
    """Returns a function that takes one step, or `together` steps, and the FLOPs of one step."""
    config = args.config
    config.model.norm, config.model.dtype = args.norm, args.dtype
    config.model.dense_product, config.train.batch_size = args.dense_product, args.batch
    experiment = build.experiment(config, data)
    feed = default_feed(experiment, data.train)
    if args.together:
        feed = resident_feed(data.train, args.batch, shuffle=False, max_steps=args.together)
    steps, items = Steps(experiment, data, feed), feed.items(0, 0)
    held = [steps.join([steps.init(0)], [0])]
    batch = feed.batch(feed.resident, next(feed.items(0, 0)))
    step = functools.partial(train_step, model=experiment.model, tx=experiment.tx)
    operations = jax.jit(step).lower(*held[0][:2], batch).cost_analysis()["flops"]

    def advance() -> Any:
        dispatch = [(next(items),) for _ in range(feed.max_steps)]
        *held[0], metrics = steps.train(*held[0], dispatch)
        return held[0], unstack(metrics, 1, 1)[0][0].loss / args.batch

    args.per_call = feed.max_steps
    return advance, operations


class Textbook(nn.Module):
    """The tutorial's network as the Flax documentation would write it."""

    norm: bool

    @nn.compact
    def __call__(self, x, train):
        """Returns logits."""

        def normalise(x):
            return (
                nn.BatchNorm(use_running_average=not train, momentum=0.75, epsilon=1e-3)(x)
                if self.norm
                else x
            )

        for filters, stride in zip((30, 50, 60), (2, 1, 1), strict=True):
            x = nn.relu(nn.Conv(filters, (3, 3), stride, padding="VALID")(normalise(x)))
        x = x.reshape(x.shape[0], -1)
        for width in (3500, 700):
            x = nn.relu(nn.Dense(width)(normalise(x)))
        return nn.Dense(10)(normalise(x))


class TextbookState(train_state.TrainState):
    """Flax's TrainState with the running statistics in it."""

    batch_stats: Any


@jax.jit
def textbook_step(state, image, label):
    """Returns the state after a step, and the loss, as the Flax documentation would write it."""

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = state.apply_fn(
            variables, image.astype(jnp.float32) / 255, train=True, mutable=["batch_stats"]
        )
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean(), updates

    (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads).replace(
        batch_stats=updates.get("batch_stats", {})
    ), value


def textbook_trainer(
    args: argparse.Namespace, data: datasets.Dataset
) -> tuple[Callable[[], Any], float]:
    """Returns a function that takes a step of the plain loop in unmodified JAX, and its FLOPs."""
    model = Textbook(args.norm == "batch")
    variables = model.init(
        jax.random.key(0), jnp.ones((1, *data.train.image.shape[1:])), train=False
    )
    state = TextbookState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.adam(1e-3),
        batch_stats=variables.get("batch_stats", {}),
    )
    rows_of, held = TrainRows(len(data.train.label), args.batch, seed=None), [state]
    steps = itertools.count()

    def advance() -> Any:
        rows = rows_of(next(steps))
        held[0], loss = textbook_step(held[0], data.train.image[rows], data.train.label[rows])
        return held[0].params, held[0].opt_state, loss

    return advance, textbook_step.lower(
        state, data.train.image[: args.batch], data.train.label[: args.batch]
    ).cost_analysis()["flops"]


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Times training steps."""
    args.per_call, args.config = 1, default_config()
    args.config.data.dir = args.folder
    for key, _, value in (word.partition("=") for word in args.set):
        override(args.config, key, value)
    data = build.dataset(args.config)
    advance, operations = (bnjax_trainer if args.model == "bnjax" else textbook_trainer)(args, data)
    losses: list[Any] = []
    calls = max(WARM_UP + 1, args.steps // args.per_call)
    seconds = timed(lambda: losses.append((result := advance())[-1]) or result, calls)
    step_s = float(np.median(seconds[WARM_UP:])) / args.per_call
    return {
        "step_s": step_s,
        "images_per_s": args.batch / step_s,
        "flop_per_s": operations / step_s,
        "losses": [float(x) for x in losses[:6]],
    }


def evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """Times the evaluation of the test images."""
    data, config = datasets.load("cifar10", args.folder), default_config()
    config.eval.batch_size = args.batch
    experiment = build.experiment(config, data)
    steps = Steps(experiment, data, default_feed(experiment, data.train))
    state = steps.init(0)
    seconds = timed(lambda: steps.test(state[0].params, state[1])[0].loss, WARM_UP + args.steps)
    median = float(np.median(seconds[WARM_UP:]))
    return {"step_s": median, "images_per_s": len(data.test.label) / median}


def matmul(args: argparse.Namespace) -> dict[str, Any]:
    """Times the network's largest matrix product, with float32 sums.

    It is that of the batch and the first dense layer's weights.
    """
    x, weight = (
        jax.random.normal(jax.random.key(0), shape, args.dtype)
        for shape in ((args.batch, 7260), (7260, 3500))
    )

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.dot(x, weight, preferred_element_type=jnp.float32)

    traced = jax.jit(product).trace(x, weight)
    compiled = traced.lower().compile(fastest_options(traced.jaxpr))
    step_s = float(np.median(timed(lambda: compiled(x, weight), WARM_UP + args.steps)[WARM_UP:]))
    return {
        "step_s": step_s,
        "flop_per_s": 2 * x.size * weight.shape[1] / step_s,
        "dtype": args.dtype,
        "by": "XLA",
    }


def blas(args: argparse.Namespace) -> dict[str, Any]:
    """Times the same product by NumPy's BLAS, float32."""
    rng = np.random.default_rng(0)
    x, weight = (
        rng.standard_normal(shape, np.float32) for shape in ((args.batch, 7260), (7260, 3500))
    )
    step_s = float(np.median(timed(lambda: x @ weight, WARM_UP + args.steps)[WARM_UP:]))
    return {
        "step_s": step_s,
        "flop_per_s": 2 * x.size * weight.shape[1] / step_s,
        "dtype": "float32",
        "by": "NumPy's BLAS",
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("train", "evaluate", "matmul", "blas"))
    parser.add_argument("folder")
    parser.add_argument("batch", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("--model", choices=("bnjax", "textbook"), default="bnjax")
    parser.add_argument("--norm", choices=[*norms.NORMS, "none"], default="batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dense-product", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--together",
        type=int,
        default=0,
        help="steps in one dispatch; 0: the number that the training loop chooses",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of config")
    parser.add_argument(
        "--release",
        action="store_true",
        help="let glibc return freed memory, as in unmodified JAX",
    )
    args = parser.parse_args()
    if args.what != "blas" and not args.release:
        keep_freed_memory()
    result = {"train": train, "evaluate": evaluation, "matmul": matmul, "blas": blas}[args.what](
        args
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    on_device = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    print(
        json.dumps(
            {
                "peer": args.model,
                "batch": args.batch,
                **result,
                "peak_bytes": on_device or peak,
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    main()
