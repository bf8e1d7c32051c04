"""Times the tutorial's training step with bnjax.norms.BatchNorm and with flax.linen.BatchNorm.

    python scripts/bench_norms.py --data-dir FOLDER --batch 512 --pairs 20

The two programs take turns. Prints one JSON object: for each layer, the seconds per step (median,
minimum, maximum) and the first losses, and the median ratio of the pairs. Without --data-dir, the
images are noise, which changes the losses but not the speed.
"""

import argparse
import functools
import json
import platform
import time
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from bnjax.data import datasets
from bnjax.models.convnet import ConvNet
from bnjax.norms import BatchNorm
from bnjax.train.cpu import compiler_options
from bnjax.train_step import init_state, train_step


class Run:
    """A training run of the tutorial's network with one of the two layers."""

    def __init__(self, norm: type[nn.Module], image: np.ndarray):
        """Compiles the step and starts from seed 0."""
        model, tx = (
            ConvNet(norm=functools.partial(norm, momentum=0.75, epsilon=1e-3)),
            optax.adam(1e-3),
        )
        step = functools.partial(train_step, model=model, tx=tx)
        self._step = jax.jit(step, donate_argnums=(0, 1), compiler_options=compiler_options())
        self._state, self._stats = jax.jit(functools.partial(init_state, model, tx))(
            jax.random.key(0), image[:1]
        )
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def advance(self, batch: dict[str, np.ndarray]) -> None:
        """Takes one step and times it."""
        start = time.perf_counter()
        self._state, self._stats, metrics = self._step(self._state, self._stats, batch)
        self.losses.append(metrics.means()["loss"])
        self.seconds.append(time.perf_counter() - start)


def main() -> None:
    """Runs the pairs and prints the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", default="", help="a folder with CIFAR-10")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=20)
    args = parser.parse_args()
    if args.data_dir:
        split = datasets.load("cifar10", args.data_dir).train
        image, label = split.image, split.label
    else:
        rng = np.random.default_rng(0)
        image, label = (
            rng.integers(0, 256, (50_000, 32, 32, 3), np.uint8),
            rng.integers(0, 10, 50_000).astype(np.int32),
        )
    ours, flax = Run(BatchNorm, image), Run(nn.BatchNorm, image)
    for number in range(args.pairs + 2):  # the first two compile and warm up
        rows = slice(
            start := number * args.batch % (len(label) - args.batch + 1), start + args.batch
        )
        for run in (ours, flax) if number % 2 else (flax, ours):
            run.advance({"image": image[rows], "label": label[rows]})
    timed = {name: run.seconds[2:] for name, run in (("bnjax", ours), ("flax", flax))}
    ratios = np.divide(timed["bnjax"], timed["flax"])
    result: dict[str, Any] = {
        "batch": args.batch,
        "pairs": args.pairs,
        "seconds": {
            name: {"median": np.median(s), "min": np.min(s), "max": np.max(s)}
            for name, s in timed.items()
        },
        "ratio": {
            "median": np.median(ratios),
            "quartiles": list(np.quantile(ratios, (0.25, 0.75))),
        },
        "losses": {"bnjax": ours.losses[:8], "flax": flax.losses[:8]},
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
