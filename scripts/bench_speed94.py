"""Compares a recipe with a peer on the same data: accuracy, seconds and FLOP/s.

    python scripts/bench_speed94.py --config configs/airbench94.py --data DIR
    python scripts/bench_speed94.py --config airbench94 --data DIR --peer 'python peer.py'

DIR has cifar-10-batches-bin. Each program trains in a separate process, first bnjax and then the
peer, a command that reads DIR from the environment variable DATA and the seed from SEED. The last
line that the peer prints must be an object with any of `accuracy`, `accuracy_views`, `seconds`
(training without compiling and loading) and `images` (the number processed in training). FLOPs
are those that XLA counts in bnjax's training step; the reference for speed is a float32 matrix
product of 4096 x 4096 on the same machine.
"""

import argparse
import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.train import build, parsing
from bnjax.train.cpu import compiler_options, prepare
from bnjax.train_step import init_state, train_step

SIDE = 4096


def ours(args: argparse.Namespace, seed: int, workdir: Path) -> dict[str, Any]:
    """Returns the results that `bnjax train` and `bnjax predict` print for one run."""
    words = [f"--config.{word}" for word in (f"seed={seed}", f"data.dir={args.data}", *args.set)]
    command = [sys.executable, "-m", "bnjax.main"]
    run(command, "train", "--config", args.config, "--workdir", str(workdir), *words)
    predict = ("predict", "--workdir", str(workdir), "--split", "test", "--json")
    plain = json.loads(run(command, *predict, "--views", "1"))
    summary = json.loads((workdir / "summary.json").read_text())
    return {
        "accuracy": plain["accuracy"],
        "accuracy_views": summary["final_test"]["accuracy"],
        "seconds": summary["seconds"],
        "images": summary["steps"] * summary["batch_size"],
    }


def run(command: list[str], *words: str) -> str:
    """Returns the output of a command.

    Raises:
        SystemExit: if it fails, with what it said.
    """
    done = subprocess.run([*command, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join([*command, *words])} failed with {done.returncode}.")
    return done.stdout


def peer(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Returns the values in the last line that the peer prints."""
    variables = {**os.environ, "DATA": args.data, "SEED": str(seed)}
    done = subprocess.run(
        shlex.split(args.peer), env=variables, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def flops_per_image(args: argparse.Namespace) -> float:
    """Returns the floating-point operations of a training step, divided by its images."""
    config = parsing.load(args.config, [f"--config.{word}" for word in args.set])
    config.data.dir = args.data
    made = build.experiment(config, build.dataset(config))
    shape = (made.batch_size, 32, 32, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, np.uint8),
        "label": jax.ShapeDtypeStruct(shape[:1], np.int32),
    }
    untrained = functools.partial(init_state, made.model, made.tx)
    states = jax.eval_shape(untrained, jax.random.key(0), batch["image"])
    step = functools.partial(train_step, model=made.model, tx=made.tx)
    cost = jax.jit(step).lower(*states, batch).cost_analysis() or {}
    return float(cost["flops"]) / made.batch_size


def product() -> float:
    """Returns the FLOP/s of a large float32 product, the best of five."""
    a = jnp.ones((SIDE, SIDE))
    multiply = jax.jit(jnp.dot, compiler_options=compiler_options())
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(multiply(a, a))
        seconds.append(time.perf_counter() - begin)
    return 2 * SIDE**3 / min(seconds[1:])


def main() -> None:
    """Trains both sides with each seed and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", default="speed94", help="file or name of a config (default: speed94)"
    )
    parser.add_argument("--data", required=True, help="the folder with cifar-10-batches-bin")
    parser.add_argument("--peer", help="a command that trains the same network")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds (default: 1)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of config")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.seeds):
            rows.append(("bnjax", seed, ours(args, seed, Path(folder) / str(seed))))
            if args.peer:
                rows.append(("peer", seed, peer(args, seed)))
    prepare(training=True)
    each, best = flops_per_image(args), product()
    print(f"{jax.devices()[0].device_kind}, product {best / 1e9:,.0f} GFLOP/s", end="")
    print(f"; {each / 1e9:.2f} GFLOP an image of training")
    print("| | seed | accuracy | over views | s | images/s | GFLOP/s | of the product |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seed, found in rows:
        rate = found["images"] / found["seconds"]
        cells = (found.get("accuracy"), found.get("accuracy_views"))
        shown = ("" if cell is None else f"{cell:.4f}" for cell in cells)
        speed = f"{rate:,.0f} | {rate * each / 1e9:,.0f} | {rate * each / best:.2f}"
        print(f"| {name} | {seed} | {' | '.join(shown)} | {found['seconds']:,.0f} | {speed} |")


if __name__ == "__main__":
    main()
