"""Reads and checks a run's folder: its config, its data, and the process that may write to it."""

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
from bnjax.train.jsonl import reading, write_json

LOCK, FOLDED = ".lock", "folded.json"
# Files that may remain if a process dies or the disk fills up at the start of a run.
OURS = (LOCK, "config.json.tmp", "comparison.json.tmp")
# Keys that may change before a run resumes, for instance because the data were moved.
PLACES = ("config.data.dir", "config.data.workers", "config.devices")


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """The facts about the training data that a network depends on."""

    name: str
    label: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> "DataFacts":
        """Returns the facts about a data set."""
        return cls(dataset.name, dataset.label, dataset.train.image_shape, dataset.classes)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks the folder against other training processes until the context or the process ends.

    Raises:
        UserError: if another process is training in the folder.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(workdir / LOCK, timeout=0).acquire()
    except filelock.Timeout as error:
        raise UserError(
            f"another process is training in {workdir}. Wait for it, stop it, or choose another "
            "folder with --workdir."
        ) from error
    with lock:
        yield


def check_is_free(out: Path) -> None:
    """Raises UserError if a folder exists and is not empty."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already. Give an empty or new folder with --out.")


def take(workdir: Path, config: ConfigDict, data: DataFacts) -> None:
    """Assigns a new folder to this config, or checks that an existing one belongs to it.

    Raises:
        UserError: if the folder has other content, or holds a run with a different config (the
            error shows the difference).
    """
    file = workdir / "config.json"
    mine = {"config": config.to_dict(), "data": dataclasses.asdict(data)}
    if not file.exists():
        if leftovers := [path.name for path in workdir.iterdir() if path.name not in OURS]:
            raise UserError(
                f"{workdir} holds {', '.join(sorted(leftovers)[:5])} but no run. Choose an empty "
                "or new folder with --workdir."
            )
        write_json(file, mine)
        return
    if (workdir / FOLDED).exists():
        raise UserError(
            f"{workdir} holds a folded network, which cannot be trained. Choose another folder "
            "with --workdir."
        )
    its, data_there = read(workdir)
    if lines := differences(
        {"config": its.to_dict(), "data": dataclasses.asdict(data_there)}, mine
    ):
        raise UserError(
            f"{workdir} belongs to a run with another config:{lines}\nChoose another folder with "
            "--workdir, or remove this one."
        )


def differences(there: dict[str, Any], now: dict[str, Any]) -> str:
    r"""Returns a line for each entry that differs between two trees, or "" if they agree.

    Ignores the keys in `PLACES`.

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
    """Returns the config with which a run was started, and the facts about its data.

    Raises:
        UserError: if the folder holds no run, or its config.json is damaged.
    """
    file = workdir / "config.json"
    if not file.is_file():
        runs = sorted(str(path.parent) for path in workdir.parent.glob("*/config.json"))
        there = (
            f" Runs found there: {', '.join(runs)}."
            if runs
            else " Train one with bnjax train --config bn."
        )
        raise UserError(f"there is no run in {workdir}: it has no config.json.{there}")
    with reading(file):
        content = json.loads(file.read_text())
        data = content["data"]
        facts = DataFacts(
            data["name"], data["label"], tuple(data["image_shape"]), tuple(data["classes"])
        )
        return parsing.from_dict(content["config"]), facts


def read_folded(workdir: Path) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Returns pairs of paths: that of a folded norm, and that of the layer it was folded into.

    Raises:
        UserError: if the folder's folded.json is damaged.
    """
    file = workdir / FOLDED
    if not file.exists():
        return ()
    with reading(file):
        pairs = json.loads(file.read_text())["pairs"]
        return tuple((tuple(norm.split(".")), tuple(layer.split("."))) for norm, layer in pairs)
