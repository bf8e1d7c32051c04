"""Variants trained over the same seeds."""

import functools
import json
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

from bnjax.compare import claims
from bnjax.compare.runs import COMPARISON
from bnjax.data.datasets import Dataset
from bnjax.errors import UserError
from bnjax.train import build, checkpoint, parsing, rundir
from bnjax.train.loop import Stopped, Summary, Trainer
from bnjax.train.run import StopRequest
from bnjax.train.rundir import write_json

SMALL = {
    "data.train_images": 5000,
    "model.filters": (8, 12, 16),
    "model.dense": (64, 32),
    "model.groups": 4,
    "train.batch_size": 500,
    "train.steps": 100,
}


Results = Mapping[int, Summary | UserError]


def fast_way() -> str:
    """Returns the way that is fast on the default backend.

    On a CPU convolutions under `jax.vmap` are far slower than one run after the other; an
    accelerator is kept busier by them, and several are kept busier still by runs of their own.
    """
    if jax.default_backend() == "cpu":
        return "one"
    return "devices" if jax.local_device_count() > 1 else "vmap"


def train(
    new_trainer: Callable[[], Trainer],
    workdirs: Mapping[int, Path],
    way: str,
    stop: StopRequest,
    begin: Callable[[Sequence[int]], None],
    end: Callable[[Results], None],
) -> Results:
    """Trains with each seed in its folder, and returns what each came to: a run, or a breakdown.

    Under "vmap" and on other devices a run is that of `train_and_evaluate` but for rounding: the
    compiler orders sums differently.

    Args:
        new_trainer: makes what trains; called once, or once for each device that is used.
        workdirs: the folder of each seed.
        way: "one": one after the other; "vmap": in one program; "devices": each device trains one
            seed at a time.
        stop: ends all of them.
        begin: is told the seeds that come now, perhaps from another thread.
        end: is told what they came to, as soon as it is known.

    Raises:
        UserError: if a folder or the disk fails; other devices save what they have and stop.
        Stopped: as `bnjax.train.loop.Trainer.train`.
    """

    def several(trainer: Trainer, seeds: Sequence[int]) -> Results:
        begin(seeds)
        found = trainer.train({seed: workdirs[seed] for seed in seeds}, stop)
        end(found)
        return found

    if way != "devices":
        trainer = new_trainer()
        groups = [[*workdirs]] if way == "vmap" else [[seed] for seed in workdirs]
        return _together(several(trainer, seeds) for seeds in groups)
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    devices = jax.local_devices()[: len(workdirs)]
    for seed in [*workdirs, *[None for _ in devices]]:
        waiting.put(seed)

    def on(device: jax.Device) -> Results:
        with jax.default_device(device):
            trainer = new_trainer()  # what it compiles is for this device
            found: Results = {}
            for seed in iter(waiting.get, None):
                if stop.signal:
                    raise Stopped(None, stop.signal)
                try:
                    found = {**found, **several(trainer, [seed])}
                except UserError as error:
                    end({seed: error})
                    raise
            return found

    with ThreadPoolExecutor(len(devices)) as pool:
        futures = [pool.submit(on, device) for device in devices]
        _, others = wait(futures, return_when=FIRST_EXCEPTION)
        if others:
            stop.signal = stop.signal or signal.SIGTERM
        wait(futures)
    errors = [error for future in futures if (error := future.exception())]
    # That something went wrong is not to be hidden by others that were stopped and are saved.
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error
    return _together(future.result() for future in futures)


def _together(several: Iterable[Results]) -> Results:
    return {seed: result for results in several for seed, result in results.items()}


def compare_configs(files: Sequence[str], words: list[str]) -> dict[str, Any]:
    """Returns the comparison of config files, without claims; `words` are overrides for all.

    Raises:
        UserError: if a config cannot be loaded, or two have one name.
    """
    names = [parsing.load(file, []).name for file in files]
    if len({*names}) < len(files):
        raise UserError(
            f"two configs have the same name: {', '.join(names)}. Give each its own config.name."
        )
    named: dict[str, tuple[str, dict[str, Any]]]
    named = {name: (file, {}) for name, file in zip(names, files, strict=True)}
    return {
        "question": "",
        "variants": _variants(named, {}, words),
        "statements": [],
        "seeds_needed": 0,
        "size": "",
    }


def compare_claim(file: str, words: list[str], *, full: bool) -> dict[str, Any]:
    """Returns the comparison that a claim file asks for, in its small version unless `full`.

    Raises:
        UserError: if the claim or one of its configs cannot be loaded.
    """
    claim = claims.load(file)
    size = "full" if full or "small" not in claim else "small"
    return {
        "question": claim["question"],
        "variants": _variants(claim["variants"], claim[size], words),
        "statements": claim["statements"],
        "seeds_needed": claim["seeds"],
        "size": size,
    }


def _variants(
    named: dict[str, tuple[str, dict[str, Any]]], common: dict[str, Any], words: list[str]
) -> dict[str, Any]:
    """Returns for each variant its file, what is overridden, the whole config and what differs.

    What a variant is about is stronger than `common`.
    """
    found: dict[str, Any] = {}
    for name, (file, own) in named.items():
        claims.check_name(name)
        pairs = {**common, **own}.items()
        overrides = [*(f"--config.{key}={value}" for key, value in pairs), *words]
        config = parsing.load(file, overrides)
        if any(word.startswith("--config.seed") for word in overrides):
            raise UserError(
                "config.seed differs from run to run in a comparison. Say how many with --seeds."
            )
        config.name = name
        config.data.fallback = ""  # other data than are asked for are no evidence
        build.check(config)
        found[name] = {
            "file": Path(file).as_posix(),
            "overrides": overrides,
            "config": json.loads(json.dumps(config.to_dict())),
        }
    leaves = [parsing.flat(variant["config"]) for variant in found.values()]
    for variant, mine in zip(found.values(), leaves, strict=True):
        variant["differs"] = {
            key: value
            for key, value in mine.items()
            if key != "name" and any(value != other[key] for other in leaves)
        }
    return found


def load_datasets(comparison: dict[str, Any]) -> dict[str, Dataset]:
    """Returns the data set of each variant, the same one for the same data, and notes its label.

    Raises:
        UserError: if data cannot be had or a variant cannot be trained on them.
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
    """Makes the folder this comparison's, or checks that it is; seeds may be added.

    Raises:
        UserError: if it holds something else, or another comparison (the difference is shown).
    """
    if (folder / COMPARISON).exists():
        there = claims.read(folder)
        names = [", ".join(sorted(which["variants"])) for which in (there, comparison)]
        lines = f"\n    variants: {names[0]} there, {names[1]} now" if names[0] != names[1] else ""
        lines = lines or rundir.differences(_identity(there), _identity(comparison))
        if gone := sorted({*there["seeds"]} - {*comparison["seeds"]}):
            lines += f"\n    seeds: {gone} there, but not now"
        if lines:
            raise UserError(
                f"{folder} belongs to another comparison:{lines}\n"
                "Choose another folder with --workdir, or remove that one."
            )
    elif leftovers := [path.name for path in folder.iterdir() if path.name not in rundir.OURS]:
        raise UserError(
            f"{folder} holds {', '.join(sorted(leftovers)[:5])} but no comparison. "
            "Choose an empty or new folder with --workdir."
        )
    write_json(folder / COMPARISON, comparison)


def _identity(comparison: dict[str, Any]) -> dict[str, Any]:
    """Returns what may not change between two calls: not the command, nor the number of seeds."""
    variants = {
        name: {key: variant[key] for key in ("config", "dataset")}
        for name, variant in comparison["variants"].items()
    }
    statements = {
        str(number): fields for number, fields in enumerate(comparison["statements"], start=1)
    }
    needed = comparison["seeds_needed"]
    return {"variants": variants, "statements": statements, "seeds_needed": needed}


def run(
    comparison: dict[str, Any],
    datasets: dict[str, Dataset],
    folder: Path,
    way: str,
    trainer: Callable[[ConfigDict, Dataset], Trainer] = Trainer,
) -> list[str]:
    """Takes the runs that are missing, variant by variant; returns why those failed that did.

    Equal seeds have equal data order and, where the shapes agree, equal initial values. Of a
    finished run the best and the last checkpoint are kept.

    Args:
        comparison: from `compare_configs` or `compare_claim`, with its `seeds` and `command`.
        datasets: of each variant.
        folder: created if need be.
        way: as for `bnjax.compare.seeds.train`.
        trainer: makes what trains the seeds of one config.

    Raises:
        UserError: if the folder belongs to another comparison or process, or the disk fails.
        Stopped, KeyboardInterrupt: after Ctrl-C or SIGTERM, when the runs of the moment are saved.
    """
    failures = []
    with (
        rundir.locked(folder),
        StopRequest() as stop,
        GridProgress(len(comparison["variants"]) * len(comparison["seeds"])) as progress,
    ):
        take_folder(folder, comparison)
        for name, variant in comparison["variants"].items():
            config = parsing.from_dict(variant["config"])
            folders = {seed: folder / name / str(seed) for seed in comparison["seeds"]}
            missing = {}
            for seed, run_folder in folders.items():
                if (run_folder / "summary.json").exists():
                    config.seed = seed
                    rundir.take(run_folder, config, rundir.DataFacts.of(datasets[name]))
                    progress.finished_before(name, seed)
                else:
                    missing[seed] = run_folder
            if missing:
                (folder / name).mkdir(exist_ok=True)
                found = train(
                    functools.partial(trainer, config, datasets[name]),
                    missing,
                    way,
                    stop,
                    functools.partial(progress.begin, name),
                    functools.partial(progress.end, name),
                )
                failures += [
                    f"{name}, seed {seed}: {result}"
                    for seed, result in found.items()
                    if isinstance(result, UserError)
                ]
            for run_folder in folders.values():
                # One that broke down may be tried again from any of its checkpoints.
                if (run_folder / "summary.json").exists():
                    with rundir.locked(run_folder):
                        checkpoint.keep_best_and_last(run_folder / "checkpoints")
    return failures


class GridProgress:
    """How much of the grid is done and how long the rest will take; several threads may tell it.

    A bar on a terminal, a line for each run everywhere.
    """

    def __init__(self, runs: int):
        """Starts before the first of so many runs."""
        self._bar = tqdm.tqdm(
            total=runs, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        self._lock = threading.Lock()
        self._runs, self._begun, self._before, self._done = runs, 0, 0, 0
        self._start = time.monotonic()

    def finished_before(self, variant: str, seed: int) -> None:
        """Says that a run was finished before."""
        with self._lock:
            self._begun += 1
            self._before += 1
            self._bar.update()
            self._say(f"{variant}, seed {seed}: finished before")

    def begin(self, variant: str, seeds: Sequence[int]) -> None:
        """Says which runs of a variant come now."""
        with self._lock:
            self._begun += len(seeds)
            to_go = ""
            if self._done:
                left = self._runs - self._before - self._done
                seconds = (time.monotonic() - self._start) / self._done * left
                to_go = f", about {tqdm.tqdm.format_interval(seconds)} to go"
            numbers = ", ".join(map(str, seeds))
            self._say(f"{variant}, seed{'s' * (len(seeds) > 1)} {numbers}{to_go}")

    def end(self, variant: str, results: Results) -> None:
        """Counts runs that ended, and says which of them failed."""
        with self._lock:
            self._done += len(results)
            self._bar.update(len(results))
            for seed, result in results.items():
                if isinstance(result, UserError):
                    self._say(f"{variant}, seed {seed} failed: {result}")

    def _say(self, what: str) -> None:
        tqdm.tqdm.write(f"[{self._begun}/{self._runs}] {what}")
        sys.stdout.flush()

    def __enter__(self) -> "GridProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
