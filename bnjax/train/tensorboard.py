"""TensorBoard: what a run shows while it goes on."""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.graph_pb2 import GraphDef

# The metrics by which the table of hyperparameters compares runs.
COMPARED = ("test/accuracy", "test/loss", "train/accuracy", "train/loss")
TILE, CAPTION, COLUMNS = 128, 34, 4  # pixels, pixels, pictures


class Board:
    """The folder of one run that TensorBoard reads.

    Every method raises OSError if it cannot be written.
    """

    def __init__(self, folder: Path, *, start: int):
        """Opens it; what an interrupted run wrote past step `start` is not shown."""
        folder.mkdir(parents=True, exist_ok=True)
        # Written by this thread: tensorboardX's SummaryWriter has one that dies of a full disk
        # without a word, and then waits for it.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{start}")
        if start:
            self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._write(step, summary=summary.scalar(name, value))

    def histogram(self, name: str, numbers: dict[str, Any], step: int) -> None:
        """Adds a histogram, given as `bnjax.train.diagnostics.summarise` returns it.

        The outer bins reach to the extremes.
        """
        count, mean, std, counts = (numbers[key] for key in ("count", "mean", "std", "counts"))
        least, most = (
            min(numbers["quantiles"][0], numbers["low"]),
            max(numbers["quantiles"][-1], numbers["high"]),
        )
        limits = np.linspace(numbers["low"], numbers["high"], len(counts) + 1)[1:]
        squares = count * (mean**2 + std**2)
        self._write(
            step,
            summary=summary.histogram_raw(
                name, least, most, count, count * mean, squares, limits.tolist(), counts
            ),
        )

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds an image, uint8 [h, w, 3]."""
        self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def graph(self, graph: GraphDef) -> None:
        """Shows the graph of the model."""
        self._write(0, graph_def=graph.SerializeToString())

    def hyperparameters(self, values: dict[str, Any]) -> None:
        """Enters the run in the table of hyperparameters, as going on until `finished`."""
        plain = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in values.items()
        }
        experiment, begin, _ = summary.hparams(plain, dict.fromkeys(COMPARED))
        self._write(0, summary=experiment)
        self._write(0, summary=begin)

    def finished(self) -> None:
        """Marks the run in the table of hyperparameters as finished."""
        *_, end = summary.hparams({}, {})
        self._write(0, summary=end)

    def _write(self, step: int, **what: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))

    def flush(self) -> None:
        """Hands everything written so far to the operating system."""
        self._events.flush()

    def close(self) -> None:
        """Closes the files."""
        self._events.close()


def contact_sheet(
    images: np.ndarray, captions: Sequence[str], marked: Sequence[bool]
) -> np.ndarray:
    """Returns the images side by side with a caption each, uint8 [h, w, 3].

    Those that are marked have a red frame.

    Args:
        images: uint8 [n, h, w, 1 or 3], n at least 1.
        captions: of one or two lines.
        marked: one for each image.
    """
    columns = min(COLUMNS, len(images))
    sheet = Image.new(
        "RGB", (columns * TILE, math.ceil(len(images) / columns) * (TILE + CAPTION)), "white"
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (image, caption, is_marked) in enumerate(zip(images, captions, marked, strict=True)):
        left, top = i % columns * TILE, i // columns * (TILE + CAPTION)
        pixels = image.repeat(3, axis=-1) if image.shape[-1] == 1 else image
        sheet.paste(
            Image.fromarray(pixels).resize((TILE - 8, TILE - 8), Image.Resampling.NEAREST),
            (left + 4, top + 4),
        )
        if is_marked:
            draw.rectangle(
                (left + 1, top + 1, left + TILE - 2, top + TILE - 2), outline=(200, 30, 30), width=3
            )
        draw.multiline_text((left + 4, top + TILE), caption, fill="black", font=font, spacing=2)
    return np.asarray(sheet)
