"""Writes and reads the JSON files of a run, most of which have one object per line."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnjax.errors import UserError
from bnjax.train.tensorboard import Board

if TYPE_CHECKING:  # so that reading files does not import JAX
    from bnjax.clinic.statistics import Drift, Gap
    from bnjax.metrics import Metrics

# A function (step, split, values), called for each line of metrics.jsonl; non-finite values are
# None.
OnMetrics = Callable[[int, str, dict[str, Any]], None]


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(draft, path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns any error raised while reading a run's file into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or from another version of bnjax ({type(error).__name__}: "
            f"{error}). Restore it from a copy, or train again in another folder with --workdir."
        ) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file with one JSON object per line, each with a `step`.

    Omits an incomplete last line; returns an empty list if the file does not exist.

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
    """Returns the first step with a training loss of at most `loss`; None if there is none."""
    train = (line for line in lines if line["split"] == "train" and line["loss"] is not None)
    return next((line["step"] for line in train if line["loss"] <= loss), None)


def _finite(value: Any) -> Any:
    """Returns the value with each non-finite float replaced by None, also inside dicts."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields names and values; a value in a nested dict is named "dict/name"."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", one) for inner, one in value.items())
        else:
            yield name, value


class Lines:
    """A file with one JSON object per line."""

    def __init__(self, path: Path, *, keep_up_to: int):
        """Opens the file for appending, and removes lines with a `step` above `keep_up_to`."""
        kept = [line for line in read_lines(path) if line["step"] <= keep_up_to]
        draft = path.with_name(path.name + ".tmp")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(draft, path)
        self._file = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Appends an object as one line."""
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

    This is a context manager. Only timing.jsonl and tensorboard/ depend on the clock.

    Each line of metrics.jsonl has `step` (counted from 1), `split`, `loss` and `accuracy`; a
    non-finite value is null. The split is "train" for the batch of a step, "test" or "validation"
    for an evaluation, or "gap" for training images under the running statistics.
    """

    def __init__(self, workdir: Path, *, start: int, on_metrics: OnMetrics | None = None):
        """Opens the files.

        Removes the lines that an interrupted run wrote after step `start`, because the resumed run
        repeats those steps. `on_metrics` is called with each line of metrics.jsonl.
        """
        self._on_metrics = on_metrics
        with contextlib.ExitStack() as stack:  # if a file cannot be opened, closes the others

            def opened(name: str) -> Lines:
                lines = Lines(workdir / f"{name}.jsonl", keep_up_to=start)
                return stack.enter_context(contextlib.closing(lines))

            self._metrics, self._timing = opened("metrics"), opened("timing")
            self._histograms = opened("histograms")
            self.board = Board(workdir / "tensorboard", start=start)
            stack.callback(self.board.close)
            self._open = stack.pop_all()

    def step(self, step: int, metrics: "Metrics", seconds: float, images_per_s: float) -> None:
        """Records a training step, with `skipped` = 1 if it was dropped.

        Args:
            step: the number of the step, counted from 1.
            metrics: the metrics of the step.
            seconds: the training time so far.
            images_per_s: the current throughput.
        """
        self._write(step, "train", metrics.means() | ({"skipped": 1} if metrics.skipped else {}))
        self._timing.write(
            {"step": step, "seconds": round(seconds, 3), "images_per_s": round(images_per_s, 1)}
        )
        self.board.scalar("train/images_per_s", images_per_s, step)

    def evaluation(self, step: int, split: str, metrics: "Metrics") -> None:
        """Records an evaluation, with the number of images as `count`."""
        self._write(step, split, metrics.means() | {"count": int(metrics.count)})

    def gap(self, step: int, found: "Gap", drifts: "dict[str, Drift]") -> None:
        """Records the gap and the drifts of `bnjax.clinic.watching.examine`.

        `batch_loss` and `batch_accuracy` are those of the same images under batch statistics;
        `drift_mean` and `drift_variance` have an entry for each norm.
        """
        values: dict[str, Any] = found.stored.means()
        values |= {f"batch_{key}": mean for key, mean in found.batch.means().items()}
        values["count"] = int(found.stored.count)
        for of in ("mean", "variance"):
            values[f"drift_{of}"] = {
                name: float(f"{getattr(one, of):.6g}") for name, one in drifts.items()
            }
        self._write(step, "gap", values)

    def _write(self, step: int, split: str, values: dict[str, Any]) -> None:
        """Appends a line to metrics.jsonl; also draws floats and dicts of floats as curves."""
        finite = _finite(values)
        self._metrics.write({"step": step, "split": split, **finite})
        numbers = dict(_flat(finite))
        for name, number in numbers.items():
            if isinstance(number, float):
                self.board.scalar(name if "/" in name else f"{split}/{name}", number, step)
        if self._on_metrics:
            self._on_metrics(step, split, numbers)

    def histograms(self, step: int, samples: Any, summaries: dict[str, dict[str, Any]]) -> None:
        """Records the samples and summaries computed by `bnjax.train.diagnostics`."""
        self._histograms.write({"step": step, **summaries})
        for kind, group in summaries.items():
            for name, numbers in group.items():
                edges = np.linspace(numbers["low"], numbers["high"], len(numbers["counts"]) + 1)
                self.board.histogram(f"{kind}/{name}", samples[kind][name], edges, step)

    def flush(self) -> None:
        """Flushes all files."""
        for file in (self._metrics, self._timing, self._histograms, self.board):
            file.flush()

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
