"""Measures the cost of a checkpoint: `python scripts/bench_checkpoint.py`.

Saves the tutorial's network and prints one JSON object: bytes on disk; the seconds for which `save`
blocks training, the seconds until the checkpoint is on disk and verified, and the seconds to
restore it; and the seconds that one save in the background adds to concurrent training steps
(median over rounds with and without a save).
"""

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import optax

from bnjax.models.convnet import ConvNet
from bnjax.norms import BatchNorm
from bnjax.train.checkpoint import Checkpoints
from bnjax.train.cpu import compiler_options
from bnjax.train_step import init_state, train_step


def main() -> None:
    """Runs the rounds and prints the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument(
        "--steps",
        type=int,
        default=10,
        help="training steps of a round, long enough for the save to end",
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (args.batch, 32, 32, 3), np.uint8),
        "label": rng.integers(0, 10, args.batch).astype(np.int32),
    }
    model, tx = (
        ConvNet(norm=functools.partial(BatchNorm, momentum=0.75, epsilon=1e-3)),
        optax.adam(1e-3),
    )
    init = jax.jit(functools.partial(init_state, model, tx))
    state, stats = init(jax.random.key(0), batch["image"][:1])
    step = jax.jit(
        functools.partial(train_step, model=model, tx=tx),
        donate_argnums=(0, 1),
        compiler_options=compiler_options(),
    )
    state, stats, metrics = step(state, stats, batch)
    metrics.means()
    held_up, rounds = [], {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoints"
        with Checkpoints(path) as checkpoints:
            for number in range(
                2 * args.rounds + 1
            ):  # the first save, which starts Orbax up, is not counted
                saves = number % 2 == 0
                start = time.perf_counter()
                if saves:
                    checkpoints.save(state, stats, None, {})
                    held_up.append(time.perf_counter() - start)
                for _ in range(args.steps):
                    state, stats, metrics = step(state, stats, batch)
                metrics.means()
                rounds[saves].append(time.perf_counter() - start)
                checkpoints.steps()  # waits
            start = time.perf_counter()
            checkpoints.save(state, stats, None, {})
            checkpoints.steps()
            on_disk = time.perf_counter() - start
            newest = checkpoints.steps()[-1]
            size = sum(
                file.stat().st_size for file in (path / str(newest)).rglob("*") if file.is_file()
            )
            start = time.perf_counter()
            checkpoints.restore(newest, jax.eval_shape(init, jax.random.key(0), batch["image"][:1]))
            restored = time.perf_counter() - start
    added = float(np.median(np.subtract(rounds[True][1:], rounds[False])))
    result = {
        "bytes": size,
        "seconds": {
            "save_holds_up": float(np.median(held_up[1:])),
            "on_disk_and_verified": on_disk,
            "restore": restored,
            "added_to_training": added,
        },
        "round": {
            "batch": args.batch,
            "steps": args.steps,
            "seconds": float(np.median(rounds[False])),
        },
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
