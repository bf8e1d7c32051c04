"""Trains several variants with the same seeds."""

import functools
import json
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

from bnjax.compare.claims import Claim
from bnjax.compare.runs import COMPARISON, listed, read_comparison
from bnjax.data.datasets import Dataset
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, checkpoint, jsonl, parsing, rundir
from bnjax.train.interrupt import Stopped, StopRequest
from bnjax.train.loop import Summary, Trainer

SMALL = {
    "data.train_images": 5000,
    "model.filters": (8, 12, 16),
    "model.dense": (64, 32),
    "model.groups": 4,
    "train.batch_size": 500,
    "train.steps": 100,
}


def fast_way() -> str:
    """Returns the fastest way to train one variant with several seeds on the default backend.

    Compared with sequential runs, convolutions in `jax.vmap` are much slower on a CPU and faster on
    an accelerator. With several accelerators, one run per device is fastest.
    """
    if jax.default_backend() == "cpu":
        return "one"
    return "devices" if jax.local_device_count() > 1 else "vmap"


def plan(claim: Claim, words: list[str], *, full: bool = False) -> dict[str, Any]:
    """Returns the content of comparison.json, without the seeds, the command and the data sets.

    Uses the small version of the claim if it has one and `full` is False. `words` are overrides for
    all variants, and take precedence over the overrides of the claim.

    Raises:
        UserError: if a config cannot be loaded or is invalid.
    """
    common = claim.full if full or claim.small is None else claim.small
    variants: dict[str, Any] = {}
    for name, (file, own) in claim.variants.items():
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(
                f"a variant cannot be called {name!r}, because its name becomes a folder name. "
                "Use letters, digits and _ . + -."
            )
        pairs = {**common, **own}.items()
        overrides = [*(f"--config.{key}={value}" for key, value in pairs), *words]
        if any(word.startswith("--config.seed") for word in overrides):
            raise UserError(
                "config.seed cannot be set, because runs of a comparison have different seeds. Use "
                "--seeds instead."
            )
        config = parsing.load(file, overrides)
        config.name = name
        config.data.fallback = ""  # results on other data would not be evidence
        build.check(config)
        variants[name] = {"config": json.loads(json.dumps(config.to_dict()))}
    return {
        "question": claim.question,
        "variants": variants,
        "statements": claim.statements,
        "seeds_needed": claim.seeds,
        "size": "small" if common is claim.small else "full",
    }


def load_datasets(comparison: dict[str, Any]) -> dict[str, Dataset]:
    """Loads each data set once, and stores its label in the variants that use it.

    Raises:
        UserError: if a data set is unavailable or a variant cannot be trained on it.
    """
    loaded: dict[str, Dataset] = {}
    found = {}
    for name, variant in comparison["variants"].items():
        config = parsing.from_dict(variant["config"])
        key = json.dumps(variant["config"]["data"])
        if key not in loaded:
            loaded[key] = build.dataset(config)
        found[name] = loaded[key]
        try:
            build.experiment(config, found[name])
        except UserError as error:
            raise UserError(f"{name} cannot be trained: {error}") from error
        variant["dataset"] = found[name].label
    return found


def take_folder(folder: Path, comparison: dict[str, Any]) -> None:
    """Writes comparison.json, or checks that the existing file matches; seeds may be added.

    Raises:
        UserError: if the folder has other content, or belongs to a different comparison (the error
            shows the differences).
    """
    if (folder / COMPARISON).exists():
        there = read_comparison(folder)
        common = there["variants"].keys() & comparison["variants"].keys()

        def fixed(which: dict[str, Any]) -> dict[str, Any]:
            return {
                "names": sorted(which["variants"]),
                "variants": {name: which["variants"][name] for name in common},
                "statements": {str(i): s for i, s in enumerate(which["statements"], start=1)},
                "seeds_needed": which["seeds_needed"],
                "seeds": [seed for seed in there["seeds"] if seed in which["seeds"]],
            }

        if lines := rundir.differences(fixed(there), fixed(comparison)):
            raise UserError(
                f"{folder} belongs to a different comparison:{lines}\n"
                "Choose a different folder with --workdir, or remove this one."
            )
    elif leftovers := [path.name for path in folder.iterdir() if path.name not in rundir.OURS]:
        raise UserError(
            f"{folder} holds {', '.join(sorted(leftovers)[:5])} but no comparison. "
            "Choose an empty or new folder with --workdir."
        )
    jsonl.write_json(folder / COMPARISON, comparison)


def run(
    comparison: dict[str, Any],
    datasets: dict[str, Dataset],
    folder: Path,
    way: str,
    trainer: Callable[[ConfigDict, Dataset], Trainer] = Trainer,
) -> list[str]:
    """Trains the missing runs, variant by variant; returns the failures.

    Runs with equal seeds have the same data order and, for equal shapes, equal initial values. With
    "vmap", or on different devices, a run equals `train_and_evaluate` except for rounding, because
    the compiler changes the order of sums. Only the best and the last checkpoint of a finished run
    are kept.

    Args:
        comparison: the content from `plan`, with `seeds` and `command` added.
        datasets: the data set of each variant.
        folder: the folder of the comparison, created if needed.
        way: "one" trains one run after another, "vmap" trains the seeds of a variant in one
            program, and "devices" trains one run at a time on each device.
        trainer: a function that returns the trainer for a config and a data set.

    Raises:
        UserError: if the folder belongs to a different comparison or is in use by another process,
            or a file cannot be written.
        Stopped, KeyboardInterrupt: after Ctrl-C or SIGTERM; the current runs are saved.
    """
    with rundir.locked(folder), StopRequest() as stop:
        take_folder(folder, comparison)
        runs = listed(folder, comparison)
        missing = [run for run in runs if not (run / "summary.json").exists()]
        progress = Progress(len(missing))
        if len(missing) < len(runs):
            progress.say(f"{len(runs) - len(missing)} of {len(runs)} runs are already finished")
        jobs = [(run.parent.name, {int(run.name): run}) for run in missing]
        if way == "vmap":
            together: dict[str, dict[int, Path]] = {}
            for name, folders in jobs:
                together.setdefault(name, {}).update(folders)
            jobs = [*together.items()]

        # A trainer compiles its programs for one device.
        @functools.lru_cache(jax.local_device_count() if way == "devices" else 1)
        def trainer_of(name: str, _: jax.Device | None) -> Trainer:
            (folder / name).mkdir(exist_ok=True)
            config = parsing.from_dict(comparison["variants"][name]["config"])
            return trainer(config, datasets[name])

        def train(device: jax.Device | None, name: str, folders: dict[int, Path]) -> None:
            progress.begin(name, [*folders])
            progress.end(name, trainer_of(name, device).train(folders, stop))

        if way == "devices":
            on_devices(train, jobs, stop)
        else:
            for job in jobs:
                train(None, *job)
        for run in runs:
            # All checkpoints of a failed run are kept, so that it can resume from any of them.
            if (run / "summary.json").exists():
                with rundir.locked(run):
                    checkpoint.keep_best_and_last(run / "checkpoints")
    return progress.failures


def on_devices(
    train: Callable[..., None], jobs: Sequence[tuple[Any, ...]], stop: StopRequest
) -> None:
    """Calls `train(device, *job)` for each job in threads, with one job at a time per device.

    Raises:
        Exception: the first error of a job; the other jobs are stopped.
    """
    free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
    for device in jax.local_devices():
        free.put(device)

    def work(job: tuple[Any, ...]) -> None:
        if stop.signal:
            raise Stopped(None, stop.signal)
        device = free.get()
        try:
            with jax.default_device(device):
                train(device, *job)
        except Exception:
            stop.signal = stop.signal or signal.SIGTERM
            raise
        finally:
            free.put(device)

    with ThreadPoolExecutor(jax.local_device_count()) as pool:
        futures = [pool.submit(work, job) for job in jobs]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error


class Progress:
    """Prints the progress of the runs and the remaining time; thread-safe.

    Attributes:
        failures: descriptions of the failed runs.
    """

    def __init__(self, runs: int):
        """Starts the clock; call it before the first of `runs` runs."""
        self.failures: list[str] = []
        self._lock, self._start = threading.Lock(), time.monotonic()
        self._runs, self._begun, self._done = runs, 0, 0

    def begin(self, variant: str, seeds: Sequence[int]) -> None:
        """Prints that the runs with these seeds start."""
        with self._lock:
            self._begun += len(seeds)
            to_go = ""
            if self._done:
                left = (time.monotonic() - self._start) / self._done * (self._runs - self._done)
                to_go = f", about {tqdm.tqdm.format_interval(left)} to go"
            which = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
            self.say(f"[{self._begun}/{self._runs}] {variant}, {which}{to_go}")

    def end(self, variant: str, results: Mapping[int, Summary | NonFiniteError]) -> None:
        """Counts finished runs and prints failures."""
        with self._lock:
            self._done += len(results)
            for seed, result in results.items():
                if isinstance(result, NonFiniteError):
                    self.failures.append(f"{variant}, seed {seed}: {result}")
                    self.say(f"{variant}, seed {seed} failed: {result}")

    def say(self, what: str) -> None:
        """Prints a line above the progress bars."""
        tqdm.tqdm.write(what)
        sys.stdout.flush()
