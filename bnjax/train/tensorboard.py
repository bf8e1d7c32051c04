"""Writes a run's files for TensorBoard."""

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
TILE, CAPTION, COLUMNS = 128, 34, 4  # in pixels, in pixels, images per row


class Board:
    """The TensorBoard folder of one run.

    Every method raises OSError if the folder cannot be written.
    """

    def __init__(self, folder: Path, *, start: int):
        """Opens the folder.

        TensorBoard hides values that an earlier process logged after step `start`.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # Events are written in this thread, because the thread of tensorboardX's SummaryWriter dies
        # silently if the disk is full, and the writer then waits for that thread forever.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".{start}")
        if start:
            self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._write(step, summary=summary.scalar(name, value))

    def histogram(self, name: str, values: np.ndarray, edges: np.ndarray, step: int) -> None:
        """Adds a histogram; values beyond the edges are counted in the outer bins."""
        clipped = np.clip(values[np.isfinite(values)], edges[0], edges[-1])
        self._write(step, summary=summary.histogram(name, clipped, edges))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds an image, uint8 [h, w, 3]."""
        self._write(step, summary=summary.image(name, image, dataformats="HWC"))

    def graph(self, graph: GraphDef) -> None:
        """Adds the graph of the model."""
        self._write(0, graph_def=graph.SerializeToString())

    def hyperparameters(self, values: dict[str, Any]) -> None:
        """Adds the run to the table of hyperparameters, unfinished until `finished` is called."""
        plain = {
            name: value if isinstance(value, int | float | str) else str(value)
            for name, value in values.items()
        }
        experiment, begin, _ = summary.hparams(plain, dict.fromkeys(COMPARED))
        self._write(0, summary=experiment)
        self._write(0, summary=begin)

    def finished(self) -> None:
        """Marks the run as finished in the table of hyperparameters."""
        *_, end = summary.hparams({}, {})
        self._write(0, summary=end)

    def _write(self, step: int, **what: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **what))

    def flush(self) -> None:
        """Flushes the event file."""
        self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()


def contact_sheet(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Returns one picture, uint8 [h, w, 3], with images side by side, each above its caption.

    Args:
        images: uint8 [n, h, w, 1 or 3], n at least 1.
        captions: a caption of one or two lines for each image.
    """
    columns = min(COLUMNS, len(images))
    size = (columns * TILE, math.ceil(len(images) / columns) * (TILE + CAPTION))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = i % columns * TILE, i // columns * (TILE + CAPTION)
        pixels = Image.fromarray(np.broadcast_to(image, (*image.shape[:2], 3)))
        tile = pixels.resize((TILE - 8, TILE - 8), Image.Resampling.NEAREST)
        sheet.paste(tile, (left + 4, top + 4))
        draw.multiline_text((left + 4, top + TILE), caption, fill="black", font=font, spacing=2)
    return np.asarray(sheet)
