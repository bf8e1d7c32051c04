"""One measurement of `scripts/accelerator.py`, in a separate process: prints JSON lines.

    python scripts/accelerator_part.py products|race|state|kernels OPTIONS

OPTIONS is a JSON object with the arguments of the function.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_step
import jax
import numpy as np

from bnjax.data.feed import host_feed, resident_feed
from bnjax.train import build, parsing
from bnjax.train.cpu import memory
from bnjax.train.steps import Steps

MOST_SEEDS = 64


def show(**found: Any) -> None:
    """Prints one JSON line."""
    print(json.dumps(found), flush=True)


def products(batch: int, steps: int, precisions: list[tuple[str, str, str]]) -> None:
    """Prints the device, and the time of a matrix product in each precision."""
    device, stats = jax.devices()[0], jax.devices()[0].memory_stats() or {}
    bytes_limit = stats.get("bytes_limit")
    show(platform=device.platform, device=device.device_kind, memory=bytes_limit)
    for name, matmul, dtype in precisions:
        with jax.default_matmul_precision(matmul):
            options = argparse.Namespace(batch=batch, steps=steps, dtype=dtype)
            show(**bench_step.matmul(options) | {"precision": name})


def experiment(config: str, folder: str, *words: str) -> tuple[Any, Any, Any]:
    """Returns a config, its data set and its experiment."""
    made = parsing.load(config, [f"--config.{word}" for word in (f"data.dir={folder}", *words)])
    data = build.dataset(made)
    return made, data, build.experiment(made, data)


def race(config: str, folder: str, words: list[str], most_seconds: float) -> None:
    """Trains one seed and then many seeds, each time all steps in one program."""
    _, data, made = experiment(config, folder, *words)
    count, size = made.steps, made.batch_size
    feed = resident_feed(data.train, size, shuffle=made.shuffle, max_steps=count)

    def train(seeds: int) -> float:
        """Trains, prints the result and returns the seconds."""
        steps = Steps(made, data, feed, seeds)

        def begin(stop: int) -> tuple[Any, Any]:
            items = [feed.items(seed, 0) for seed in range(seeds)]
            states = steps.join([steps.init(seed) for seed in range(seeds)], [0] * seeds)
            return states, [tuple(map(next, items)) for _ in range(stop)]

        def timed(stop: int) -> tuple[float, Any]:
            states, dispatch = jax.block_until_ready(begin(stop))
            began = time.perf_counter()
            states = jax.block_until_ready(steps.train(*states, dispatch))
            return time.perf_counter() - began, states

        timed(1)  # compiles
        brief, _ = timed(2)
        if brief / 2 * count > 2 * most_seconds:
            raise TimeoutError(f"{seeds} seeds would take {brief / 2 * count:.0f} s")
        seconds, (state, batch_stats, *_) = timed(count)
        tested = steps.test(*steps.evaluated(state, batch_stats))
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        images = count * size * seeds
        accuracies = [one.means()["accuracy"] for one in tested]
        found = {"seconds": seconds, "images": images, "compile_s": steps.compile_seconds}
        show(seeds=seeds, accuracies=accuracies, peak_bytes=peak, **found)
        return seconds

    alone = train(1)
    peak, limit = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"), memory()
    seeds = min(MOST_SEEDS, int(0.9 * limit / peak) if peak and limit else 2)
    seeds = max(2, min(seeds, int(most_seconds / alone)))
    while True:
        try:
            train(seeds)
            return
        except (jax.errors.JaxRuntimeError, TimeoutError) as error:
            is_too_large = isinstance(error, TimeoutError) or "RESOURCE_EXHAUSTED" in str(error)
            if seeds == 2 or not is_too_large:
                raise
        seeds = max(2, seeds // 2)


def tutorial(folder: str, batch: int, *words: str) -> tuple[list[Any], Callable[[], Any]]:
    """Returns the states of the tutorial's training, and a function that takes a step."""
    _, data, made = experiment("bn", folder, f"train.batch_size={batch}", *words)
    feed = host_feed(data.train, batch, shuffle=False)
    steps, items = Steps(made, data, feed), feed.items(0, 0)
    held = [steps.join([steps.init(0)], [0])]

    def step() -> Any:
        *held[0], metrics = steps.train(*held[0], [(next(items),)])
        return metrics.loss

    return held, step


def state(file: str, folder: str, words: list[str], batch: int, steps: int) -> None:
    """Saves parameters and statistics after some steps.

    The optimizer is SGD, because Adam divides by the size of a gradient, which amplifies rounding.
    """
    sgd = ("optimizer.name=sgd", "optimizer.learning_rate=0.01")
    held, step = tutorial(folder, batch, *sgd, *words)
    for _ in range(steps):
        step()
    trained, batch_stats, _ = jax.device_get(held[0])
    trees = {"params": trained.params, "batch_stats": batch_stats}
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    np.savez(file, **{"/".join(str(key.key) for key in path): leaf for path, leaf in leaves})
    show(arrays=len(leaves))


def kernels(folder: str, words: list[str], batch: int, steps: int) -> None:
    """Prints the ten longest kernels of the tutorial's step."""
    _, step = tutorial(folder, batch, *words)
    jax.block_until_ready([step() for _ in range(2)])
    with tempfile.TemporaryDirectory() as traced:
        with jax.profiler.trace(traced):
            jax.block_until_ready([step() for _ in range(steps)])
        (file,) = Path(traced).rglob("*.xplane.pb")
        planes = [*jax.profiler.ProfileData.from_file(str(file)).planes]
    times: dict[tuple[str, str], float] = {}
    on_device = [plane for plane in planes if plane.name.startswith("/device:")]
    for line in (line for plane in on_device or planes for line in plane.lines):
        # Other lines of a device repeat the kernels by module or by scope.
        if on_device and not line.name.startswith(("Stream", "XLA Ops")):
            continue
        for event in line.events:
            stats = dict(event.stats)
            if on_device or "hlo_op" in stats:
                key = (event.name, str(stats.get("hlo_op", "")))
                times[key] = times.get(key, 0) + event.duration_ns / 1e6 / steps
    total = sum(times.values())
    for (name, operation), ms in sorted(times.items(), key=lambda item: -item[1])[:10]:
        show(name=name, operation=operation, ms=ms, share=ms / total)


if __name__ == "__main__":
    parts = {"products": products, "race": race, "state": state, "kernels": kernels}
    parts[sys.argv[1]](**json.loads(sys.argv[2]))
