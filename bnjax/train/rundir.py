"""Writes and reads the files of a run's folder."""

import contextlib
import dataclasses
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import numpy as np
from ml_collections import ConfigDict

from bnjax.data.datasets import Dataset
from bnjax.errors import UserError
from bnjax.train import parsing
from bnjax.train.tensorboard import Board

if TYPE_CHECKING:  # reports read runs without JAX
    from bnjax.train.build import Experiment


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(draft, path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Reports whatever goes wrong while a file of a run is read as one `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or from another version of bnjax ({type(error).__name__}: "
            f"{error}). Restore it from a copy, or train anew in another folder with --workdir."
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file with one JSON object a line, each with a `step`.

    A torn last line is left out; without a file there are none.

    Each line of a metrics.jsonl has `split`, `loss` (None if not finite) and `accuracy`. The split
    is "train", the batch of a step; "test", an evaluation; or "gap": training images under the
    running statistics, with `batch_loss` and `batch_accuracy` of the same under their own, and for
    each norm in `drift_mean` and `drift_variance` what `bnjax.clinic.statistics.Drift` says.

    Raises:
        UserError: if the file is damaged.
    """
    if not path.exists():
        return []
    with reading(path):
        *whole, _ = path.read_text().split("\n")
        lines = [json.loads(line) for line in whole]
        if not all(line["step"] > 0 for line in lines):
            raise ValueError("a step is not above 0")
    return lines


def first_at_or_below(lines: list[dict[str, Any]], loss: float) -> int | None:
    """Returns the first step whose training loss was that low, None if none was."""
    train = (line for line in lines if line["split"] == "train" and line["loss"] is not None)
    return next((line["step"] for line in train if line["loss"] <= loss), None)


def _finite(value: Any) -> Any:
    """Returns None for a float that is not finite, also in dicts."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Lines:
    """A file with one JSON object a line."""

    def __init__(self, path: Path, *, keep_up_to: int):
        """Opens the file to append, without the lines whose `step` is above `keep_up_to`."""
        kept = [line for line in read_lines(path) if line["step"] <= keep_up_to]
        draft = path.with_name(path.name + ".tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(draft, path)
        self._file = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Appends one object."""
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Waits until everything written so far is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class RunWriter:
    """The files of one run: metrics.jsonl, timing.jsonl, histograms.jsonl and tensorboard/.

    A context manager.

    Only timing.jsonl and tensorboard/ depend on the clock.
    """

    def __init__(self, workdir: Path, *, start: int):
        """Opens the files.

        Lines of an interrupted run past step `start` are dropped: the run writes them again.
        """
        with contextlib.ExitStack() as stack:  # closes the others if one cannot be opened

            def opened(name: str) -> Lines:
                lines = Lines(workdir / f"{name}.jsonl", keep_up_to=start)
                return stack.enter_context(contextlib.closing(lines))

            self._metrics, self._timing = opened("metrics"), opened("timing")
            self._histograms = opened("histograms")
            self.board = Board(workdir / "tensorboard", start=start)
            stack.callback(self.board.close)
            self._open = stack.pop_all()

    def metrics(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Records metrics under the keys that `read_lines` describes.

        Args:
            step: counted from 1.
            split: "train", "test" or "gap".
            values: floats, and dicts of floats, are curves too, and null where not finite.
        """
        finite = _finite(values)
        self._metrics.write({"step": step, "split": split, **finite})
        groups = {split: finite}
        groups |= {key: value for key, value in finite.items() if isinstance(value, dict)}
        for group, curves in groups.items():
            for name, number in curves.items():
                if isinstance(number, float):
                    self.board.scalar(f"{group}/{name}", number, step)

    def timing(self, step: int, seconds: float, images_per_s: float) -> None:
        """Records the seconds since training began and the current rate."""
        self._timing.write(
            {"step": step, "seconds": round(seconds, 3), "images_per_s": round(images_per_s, 1)}
        )
        self.board.scalar("train/images_per_s", images_per_s, step)

    def histograms(self, step: int, samples: Any, summaries: dict[str, dict[str, Any]]) -> None:
        """Records the samples and summaries of `bnjax.train.diagnostics`."""
        self._histograms.write({"step": step, **summaries})
        for kind, group in summaries.items():
            for name, numbers in group.items():
                edges = np.linspace(numbers["low"], numbers["high"], len(numbers["counts"]) + 1)
                self.board.histogram(f"{kind}/{name}", samples[kind][name], edges, step)

    def pictures(self, step: int, sheet: np.ndarray) -> None:
        """Shows a picture of predictions for a few test images, uint8 [h, w, 3]."""
        self.board.picture("test/predictions", sheet, step)

    def flush(self) -> None:
        """Hands everything written so far to the operating system."""
        for file in (self._metrics, self._timing, self._histograms, self.board):
            file.flush()

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


LOCK, FOLDED = ".lock", "folded.json"
# Left by a process that died, or met a full disk, at its start.
OURS = (LOCK, "config.json.tmp", "comparison.json.tmp")
# May differ between the parts of one run: the data may be moved, other devices and cores be free.
PLACES = ("config.data.dir", "config.data.workers", "config.devices")


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """The facts of the training data that a network needs."""

    name: str
    label: str
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> "DataFacts":
        """Returns those of a data set."""
        return cls(dataset.name, dataset.label, dataset.train.image_shape, dataset.classes)


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Locks the folder against other processes that train; the end of this process frees it.

    Raises:
        UserError: if another process trains there.
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
    """Raises UserError if a folder has anything in it."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} exists already. Give an empty or new folder with --out.")


def take(workdir: Path, config: ConfigDict, data: DataFacts) -> None:
    """Makes the folder this config's, or checks that it is.

    Raises:
        UserError: if it holds something else; of another config's run the difference is shown.
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
            f"{workdir} holds a folded network, which cannot be trained on. Choose another folder "
            "with --workdir."
        )
    its, data_there = read(workdir)
    if lines := differences(
        {"config": its.to_dict(), "data": dataclasses.asdict(data_there)}, mine
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
        UserError: if the folder holds no run, or its config.json is damaged.
    """
    file = workdir / "config.json"
    if not file.is_file():
        runs = sorted(str(path.parent) for path in workdir.parent.glob("*/config.json"))
        there = (
            f" There is: {', '.join(runs)}." if runs else " Train one with bnjax train --config bn."
        )
        raise UserError(f"there is no run in {workdir}: it has no config.json.{there}")
    with reading(file):
        content = json.loads(file.read_text())
        data = content["data"]
        facts = DataFacts(
            data["name"], data["label"], tuple(data["image_shape"]), tuple(data["classes"])
        )
        return parsing.from_dict(content["config"]), facts


def folded_pairs(workdir: Path) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]:
    """Returns pairs of paths: a folded norm, and the layer that it was folded into.

    Raises:
        UserError: if the folder's folded.json is damaged.
    """
    file = workdir / FOLDED
    if not file.exists():
        return ()
    with reading(file):
        pairs = json.loads(file.read_text())["pairs"]
        return tuple((tuple(norm.split(".")), tuple(layer.split("."))) for norm, layer in pairs)


def summarise(
    config: ConfigDict, workdir: Path, dataset: Dataset, experiment: "Experiment", seconds: float
) -> dict[str, Any]:
    """Returns the summary of a run, from its metrics.jsonl."""
    import jax

    lines = read_lines(workdir / "metrics.jsonl")
    train = [line for line in lines if line["split"] == "train"]
    tests = [line for line in lines if line["split"] == "test"]
    steps = train[-1]["step"]
    best = max(tests, key=lambda line: line["accuracy"])
    result = ("step", "loss", "accuracy", "count")
    return {
        "name": config.name,
        "dataset": dataset.label,
        "official_pixels": dataset.official,
        "fallback_reason": dataset.fallback_reason,
        "steps": steps,
        "ended": "all steps taken"
        if steps == experiment.steps
        else f"training loss at or below {experiment.stop_at_loss:g}",
        "skipped_steps": sum(line.get("skipped", 0) for line in train),
        "batch_size": experiment.batch_size,
        "steps_to_loss": {
            f"{config.train.target_loss:g}": first_at_or_below(lines, config.train.target_loss)
        },
        "final_train": {key: train[-1][key] for key in ("loss", "accuracy")},
        "final_test": {key: tests[-1][key] for key in result},
        "best_test": {key: best[key] for key in result},
        "seconds": round(seconds, 1),
        "images_per_s": round(steps * experiment.batch_size / max(seconds, 1e-3), 1),
        "versions": versions(),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "git": _git_revision(),
    }


def as_text(summary: dict[str, Any]) -> str:
    """Returns the result of a run as a few lines of text."""
    target, reached = next(iter(summary["steps_to_loss"].items()))
    best, last = summary["best_test"], summary["final_test"]
    first = "not reached" if reached is None else f"first at step {reached}"
    return "\n".join(
        [
            f"\n{summary['name']} on {summary['dataset']}, {summary['steps']} steps of "
            f"{summary['batch_size']} images:",
            f"  training loss at or below {target}: {first}",
            f"  test accuracy {last['accuracy']:.4f}, loss {last['loss']:.4f} at the end; "
            f"all {last['count']:,} test images",
            f"  best test accuracy {best['accuracy']:.4f}, loss {best['loss']:.4f} at step "
            f"{best['step']}",
            f"  {summary['seconds']:,.0f} s of training, {summary['images_per_s']:,.0f} images/s "
            f"on {summary['device']}",
        ]
    )


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that a result depends on."""
    packages = ("bnjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # bnjax itself, run from a clone
        return "not installed"


def _git_revision(package: Path = Path(__file__).parents[1]) -> str | None:
    """Returns the git revision of the package, None if no repository tracks it.

    An installed package may lie within another project's repository.
    """
    git = ["git", "-C", str(package)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "."], capture_output=True, check=True)
        command = [*git, "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
