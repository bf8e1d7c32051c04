"""Every variant of a comparison over the same seeds, each in a run's folder of its own: `<folder>/<variant>/<seed>/`."""

import functools
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tqdm

from bnjax.compare import claims, seeds
from bnjax.data.datasets import Dataset
from bnjax.errors import NonFiniteError, UserError
from bnjax.train import build, parsing, rundir
from bnjax.train.interrupt import StopRequest
from bnjax.train.records import write_json


def compare_configs(files: Sequence[str], words: list[str]) -> dict[str, Any]:
    """Returns the comparison of config files, without claims; `words` are overrides for all, as on a command line.

    Raises:
        UserError: if a config cannot be loaded, or two have one name.
    """
    found: list[tuple[str, tuple[str, dict[str, Any]]]] = [
        (parsing.load(file, []).name, (file, {})) for file in files
    ]
    if len({name for name, _ in found}) < len(files):
        raise UserError(
            f"two configs have the same name: {', '.join(name for name, _ in found)}. Give each its own config.name."
        )
    return {
        "question": "",
        "variants": _variants(dict(found), {}, words),
        "statements": [],
        "seeds_needed": 0,
        "size": "",
    }


def compare_claim(file: str, words: list[str], *, full: bool) -> dict[str, Any]:
    """Returns the comparison that a claim file asks for, in its small version if it has one, unless `full`.

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
    """Returns for each variant its file, what is overridden and the whole config; what a variant is about is stronger than `common`."""
    found = {}
    for name, (file, own) in named.items():
        claims.check_name(name)
        overrides = [
            *(f"--config.{key}={value}" for key, value in {**common, **own}.items()),
            *words,
        ]
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
    leaves = {name: parsing.flat(variant["config"]) for name, variant in found.items()}
    for name, variant in found.items():
        others = [leaves[other] for other in leaves]
        variant["differs"] = {
            key: value
            for key, value in leaves[name].items()
            if key != "name" and any(value != other[key] for other in others)
        }
    return found


def load_data(comparison: dict[str, Any]) -> dict[str, Dataset]:
    """Returns the data set of each variant, the same one for the same data, after building each variant once; notes its label.

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


def claim_folder(folder: Path, comparison: dict[str, Any]) -> None:
    """Makes the folder this comparison's, or checks that it is; seeds may be added to those that it has.

    Raises:
        UserError: if it holds something else, or another comparison (the difference is shown).
    """
    if (folder / claims.FILE).exists():
        there = claims.read(folder)
        names = [", ".join(sorted(which["variants"])) for which in (there, comparison)]
        lines = f"\n    variants: {names[0]} there, {names[1]} now" if names[0] != names[1] else ""
        lines = lines or rundir.differences(_identity(there), _identity(comparison))
        if gone := sorted({*there["seeds"]} - {*comparison["seeds"]}):
            lines += f"\n    seeds: {gone} there, but not now"
        if lines:
            raise UserError(
                f"{folder} belongs to another comparison:{lines}\nChoose another folder with --workdir, or remove that one."
            )
    elif leftovers := [path.name for path in folder.iterdir() if path.name not in rundir.OURS]:
        raise UserError(
            f"{folder} holds {', '.join(sorted(leftovers)[:5])} but no comparison. Choose an empty or new folder with --workdir."
        )
    write_json(folder / claims.FILE, comparison)


def _identity(comparison: dict[str, Any]) -> dict[str, Any]:
    """Returns what may not change between two calls: not the command, nor the number of seeds."""
    variants = {
        name: {key: variant[key] for key in ("config", "dataset")}
        for name, variant in comparison["variants"].items()
    }
    statements = {
        str(number): fields for number, fields in enumerate(comparison["statements"], start=1)
    }
    return {
        "variants": variants,
        "statements": statements,
        "seeds_needed": comparison["seeds_needed"],
    }


def run(
    comparison: dict[str, Any], datasets: dict[str, Dataset], folder: Path, way: str
) -> list[str]:
    """Takes the runs that are missing, variant by variant; returns what went wrong in those that broke down.

    Equal seeds have equal data order and, where the shapes agree, equal initial values. Of a finished run the last checkpoint is kept.
    `way` is as for `bnjax.compare.seeds.train`.

    Raises:
        UserError: if the folder belongs to another comparison or process, or the disk fails.
        Stopped, KeyboardInterrupt: after Ctrl-C or SIGTERM, when the runs of the moment have been saved.
    """
    failures = []
    with (
        rundir.locked(folder),
        StopRequest() as stop,
        Progress(len(comparison["variants"]) * len(comparison["seeds"])) as progress,
    ):
        claim_folder(folder, comparison)
        for name, variant in comparison["variants"].items():
            config = parsing.from_dict(variant["config"])
            missing = {}
            for seed in comparison["seeds"]:
                run_folder = folder / name / str(seed)
                if (run_folder / "summary.json").exists():
                    config.seed = seed
                    rundir.claim(run_folder, config, rundir.DataFacts.of(datasets[name]))
                    progress.finished(f"{name}, seed {seed}")
                else:
                    missing[seed] = run_folder
            if missing:
                (folder / name).mkdir(exist_ok=True)
                begin = functools.partial(progress.begin, name)
                found = seeds.train(config, datasets[name], missing, way, stop, begin)
                failures += [
                    f"{name}, seed {seed}: {error}"
                    for seed, error in found.items()
                    if isinstance(error, NonFiniteError)
                ]
            for seed in comparison["seeds"]:
                _keep_the_last_checkpoint(folder / name / str(seed))
    return failures


def _keep_the_last_checkpoint(folder: Path) -> None:
    if not (
        folder / "summary.json"
    ).exists():  # it broke down, and may be tried again from any of them
        return
    steps = sorted(
        int(path.name) for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()
    )
    for step in steps[:-1]:
        shutil.rmtree(folder / "checkpoints" / str(step))


class Progress:
    """How much of the grid is done and how long the rest will take: a bar on a terminal, a line for each run everywhere."""

    def __init__(self, runs: int):
        """Starts before the first of so many runs."""
        self._bar = tqdm.tqdm(
            total=runs, unit="run", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )
        self._runs, self._number, self._taken, self._began = runs, 0, 0, time.monotonic()

    def finished(self, what: str) -> None:
        """Says that a run was finished before."""
        self._number += 1
        self._say(f"{what}: finished before")

    def begin(self, variant: str, seeds: Sequence[int]) -> None:
        """Says which runs of a variant come now; they count as taken when the next ones begin."""
        left = self._runs - self._number
        seconds = (time.monotonic() - self._began) / max(self._taken, 1) * left
        to_go = f", about {tqdm.tqdm.format_interval(seconds)} to go" if self._taken else ""
        self._bar.update(self._number - self._bar.n)
        self._number += len(seeds)
        self._taken += len(seeds)
        self._say(
            f"{variant}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}{to_go}"
        )

    def _say(self, what: str) -> None:
        tqdm.tqdm.write(f"[{self._number}/{self._runs}] {what}")
        sys.stdout.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._bar.update(self._runs - self._bar.n)
        self._bar.close()
