"""The files that a run leaves behind while it goes on, written and read."""

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from bnjax.errors import UserError
from bnjax.train.tensorboard import Board


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(draft, path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a file with one JSON object a line, each with a `step` above 0.

    A torn last line is left out.

    Raises:
        UserError: naming the first line that is something else.
    """
    found = []
    for number, line in enumerate(
        path.read_bytes().splitlines(keepends=True) if path.exists() else [], start=1
    ):
        if line.endswith(b"\n"):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if (
                not isinstance(value, dict)
                or type(value.get("step")) is not int
                or not 0 < value["step"] < 2**53
            ):
                raise _damaged(path, f"line {number}")
            found.append(value)
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl.

    Each has `step`, `split`, `loss` (None if not finite) and `accuracy`. The split is "train", the
    batch of a step; "test", an evaluation; or "gap": training images under the running statistics,
    with `batch_loss` and `batch_accuracy` of the same under their own, and for each norm in
    `drift_mean` and `drift_variance` what `bnjax.clinic.gap.Drift` says.

    Raises:
        UserError: naming the step of the first line that is something else.
    """
    lines = read_lines(path)
    for line in lines:
        split = line.get("split")
        prefixes = ("", "batch_") if split == "gap" else ("",)
        losses = [line.get(f"{prefix}loss", "") for prefix in prefixes]
        if split == "gap":
            drifts = [line.get(f"drift_{of}") for of in ("mean", "variance")]
            losses += [x for of in drifts for x in (of.values() if isinstance(of, dict) else [""])]
        if (
            split not in ("train", "test", "gap")
            or any(type(line.get(f"{prefix}accuracy")) is not float for prefix in prefixes)
            or not all(loss is None or type(loss) is float for loss in losses)
        ):
            raise _damaged(path, f"the line of step {line['step']}")
    return lines


def first_at_or_below(lines: list[dict[str, Any]], loss: float) -> int | None:
    """Returns the first step whose training loss was that low, None if none was."""
    train = (line for line in lines if line["split"] == "train" and line["loss"] is not None)
    return next((line["step"] for line in train if line["loss"] <= loss), None)


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{what} of {path} is damaged. Restore the file from a copy, or train anew in another "
        "folder with --workdir."
    )


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

        What an interrupted run wrote past step `start` is dropped, since it comes again.
        """
        with contextlib.ExitStack() as stack:  # if one cannot be opened, the others are closed

            def opened(name: str) -> Lines:
                lines = Lines(workdir / f"{name}.jsonl", keep_up_to=start)
                return stack.enter_context(contextlib.closing(lines))

            self._metrics, self._timing = opened("metrics"), opened("timing")
            self._histograms = opened("histograms")
            self.board = Board(workdir / "tensorboard", start=start)
            stack.callback(self.board.close)
            self._open = stack.pop_all()

    def train(self, step: int, means: dict[str, float], *, skipped: bool) -> None:
        """Records the loss and accuracy of the batch of one training step, steps counted from 1.

        A loss that is not finite is null.
        """
        self._write(step, "train", means, **{"skipped": 1} if skipped else {})

    def test(self, step: int, means: dict[str, float], count: int) -> None:
        """Records an evaluation of the test images after so many steps."""
        self._write(step, "test", means, count=count)

    def gap(
        self, step: int, means: dict[str, float], count: int, drifts: dict[str, dict[str, float]]
    ) -> None:
        """Records the gap after so many steps; for the keys see `read_metrics`."""
        short = {
            key: {name: _short(value) for name, value in of_norms.items()}
            for key, of_norms in drifts.items()
        }
        self._write(step, "gap", means, count=count, **short)
        for key, of_norms in short.items():
            for name, value in of_norms.items():
                if value is not None:
                    self.board.scalar(f"{key}/{name}", value, step)

    def timing(self, step: int, seconds: float, images_per_s: float) -> None:
        """Records the seconds since training began and the current rate."""
        self._timing.write(
            {"step": step, "seconds": round(seconds, 3), "images_per_s": round(images_per_s, 1)}
        )
        self.board.scalar("train/images_per_s", images_per_s, step)

    def histograms(self, step: int, summaries: dict[str, dict[str, dict[str, Any]]]) -> None:
        """Records what `bnjax.train.histograms.summarise` returned after so many steps."""
        self._histograms.write({"step": step, **summaries})
        for kind, group in summaries.items():
            for name, numbers in group.items():
                self.board.histogram(f"{kind}/{name}", numbers, step)

    def pictures(self, step: int, sheet: np.ndarray) -> None:
        """Shows predictions for a few test images after so many steps, uint8 [h, w, 3]."""
        self.board.picture("test/predictions", sheet, step)

    def _write(self, step: int, split: str, means: dict[str, float], **more: Any) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in means.items()}
        self._metrics.write({"step": step, "split": split, **finite, **more})
        for name, value in finite.items():
            if value is not None:
                self.board.scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        """Hands everything written so far to the operating system."""
        for file in (self._metrics, self._timing, self._histograms, self.board):
            file.flush()

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
