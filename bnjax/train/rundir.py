"""The folder of one run: whose it is, and what is in it.

`config.json` (the config, and the data it met), `metrics.jsonl`, `timing.jsonl`,
`histograms.jsonl`, `summary.json`, `checkpoints/`, `tensorboard/`. A network that was made of a
run's has a folder of its own, with `config.json`, `checkpoints/` and, if it is folded,
`folded.json`.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.errors import UserError
from bnjax.train import parsing
from bnjax.train.records import write_json

LOCK = ".lock"
FOLDED = "folded.json"
OURS = (
    LOCK,
    "config.json.tmp",
    "comparison.json.tmp",
)  # what a process may have left that died or met a full disk at its start
# Not part of what a run is: the same data may lie elsewhere tomorrow, other devices and cores be
# free.
PLACES = ("config.data.dir", "config.data.workers", "config.devices")


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What the network has to know of the data that it was trained on."""

    name: str
    label: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> "DataFacts":
        """Returns the facts of a data set."""
        return cls(dataset.name, dataset.label, dataset.train.image_shape, dataset.classes)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps other processes from training in the folder; whatever ends this process frees it.

    Raises:
        UserError: if another process trains there, or the folder cannot be written.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"another process is training in {workdir}. Wait for it, stop it, or choose another "
            "folder with --workdir."
        ) from error
    except OSError as error:
        raise UserError(
            f"the run's folder {workdir} cannot be written: {error.strerror}. Choose another with "
            "--workdir."
        ) from error
    with lock:
        yield


def check_is_free(out: Path) -> None:
    """Raises UserError if a folder has anything in it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already. Give an empty or new folder with --out.")


def take(workdir: Path, config: ConfigDict, data: DataFacts) -> None:
    """Makes the folder this config's, or checks that it is.

    Raises:
        UserError: if it holds another config's run (the difference is shown) or cannot be written.
    """
    file = workdir / "config.json"
    mine = {"config": config.to_dict(), "data": dataclasses.asdict(data)}
    try:
        if not file.exists():
            if leftovers := [path.name for path in workdir.iterdir() if path.name not in OURS]:
                raise UserError(
                    f"{workdir} holds {', '.join(sorted(leftovers)[:5])} but no run. Choose an "
                    "empty or new folder with --workdir."
                )
            write_json(file, mine)
            return
    except OSError as error:
        raise UserError(
            f"the run's folder {workdir} cannot be used: {error.strerror}. Choose another with "
            "--workdir."
        ) from error
    if (workdir / FOLDED).exists():
        raise UserError(
            f"{workdir} holds a folded network, which is not trained any further. Choose another "
            "folder with --workdir."
        )
    config_there, data_there = read(workdir)
    if lines := differences(
        {"config": config_there.to_dict(), "data": dataclasses.asdict(data_there)}, mine
    ):
        raise UserError(
            f"{workdir} belongs to a run with another config:{lines}\nChoose another folder with "
            "--workdir, or remove that one."
        )


def differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    r"""Returns a line for each entry of two trees that differs, and nothing if they agree.

    Where the data lie is no difference.

    >>> differences({"a": {"b": 1, "c": (2,)}}, {"a": {"b": 3, "c": [2]}})
    '\n    a.b: 1 there, 3 now'
    """
    its, mine = parsing.flat(there), parsing.flat(now)
    different = [
        key
        for key in sorted({*mine, *its})
        if mine.get(key) != its.get(key) and not key.endswith(PLACES)
    ]
    return "".join(
        f"\n    {key}: {its.get(key)!r} there, {mine.get(key)!r} now" for key in different
    )


def read(workdir: Path) -> tuple[ConfigDict, DataFacts]:
    """Returns the config that a run was started with and the facts of its data.

    Raises:
        UserError: if the folder holds no run or its config.json is damaged.
    """
    file = workdir / "config.json"
    if not file.is_file():
        runs = sorted(str(path.parent) for path in workdir.parent.glob("*/config.json"))
        there = (
            f" There is: {', '.join(runs)}." if runs else " Train one with bnjax train --config bn."
        )
        raise UserError(f"there is no run in {workdir}: it has no config.json.{there}")
    try:
        content = json.loads(file.read_text())
        config = parsing.from_dict(content["config"])
        data = content["data"]
        height, width, channels = map(int, data["image_shape"])
        facts = DataFacts(
            str(data["name"]),
            str(data["label"]),
            (height, width, channels),
            tuple(map(str, data["classes"])),
        )
    except (
        OSError,
        ValueError,
        ArithmeticError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        UserError,
    ) as error:
        raise UserError(
            f"{file} is damaged, or from another version of bnjax ({type(error).__name__}: "
            f"{error})."
        ) from error
    return config, facts


def folded_pairs(workdir: Path) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Returns the paths of the norms that were folded and of the layers that have them now.

    Raises:
        UserError: if the folder's folded.json is damaged.
    """
    file = workdir / FOLDED
    if not file.exists():
        return ()
    try:
        pairs = json.loads(file.read_text())["pairs"]
        return tuple((tuple(norm.split(".")), tuple(layer.split("."))) for norm, layer in pairs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}).") from error


def norm_conventions(config: ConfigDict) -> dict[str, Any]:
    """Returns how the stored statistics are to be read.

    The momentum is the fraction of the old average that is kept.
    """
    return {key: config.model[key] for key in ("norm", "epsilon", "momentum", "variance", "debias")}
