"""What an exported model says about itself: `manifest.json`."""

import calendar
import dataclasses
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

from bnjax.errors import UserError

FILE = "manifest.json"
FORMAT = 1
# docs.jax.dev, "Exporting and serializing", compatibility guarantees.
MONTHS_NEWER, WEEKS_OLDER = 6, 3


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The facts of an exported model that whoever runs it has to know.

    Attributes:
        name: of the run's config.
        step: of its checkpoint.
        dataset: that it was trained on.
        classes: their names, in the order of the logits.
        image_shape: of one image, [h, w, c].
        image_dtype: of the images that are given; they become floats from 0 to 1 inside.
        arithmetic: the dtype that the layers compute in.
        folded: the norms that were folded, and the layers that have them now, by their paths.
        kept: the norms that were not, and why.
        exported: the day.
        versions: of Python and the packages that wrote it.
        platforms: that the StableHLO program is for.
        window: in which JAX promises to load it.
        onnx: opset, version of the format, and arithmetic of the ONNX model; None without one.
        agreement: with the run: on which images, and by how much the logits differ.
        files: the SHA-256 of each.
    """

    name: str
    step: int
    dataset: str
    classes: list[str]
    image_shape: list[int]
    image_dtype: str
    arithmetic: str
    folded: dict[str, str]
    kept: dict[str, str]
    exported: str
    versions: dict[str, str]
    platforms: list[str]
    window: dict[str, Any]
    onnx: dict[str, Any] | None
    agreement: dict[str, Any]
    files: dict[str, str]
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Returns what a folder says of its model.

        Raises:
            UserError: if it has none, or one that is damaged or of another version of bnjax.
        """
        file = folder / FILE
        if not file.is_file():
            run = " It holds a run: give it with --workdir." * (folder / "config.json").exists()
            raise UserError(
                f"there is no exported model in {folder}: it has no {FILE}.{run} Write one with "
                "bnjax export --workdir RUN --out DIR."
            )
        try:
            found = cls(**json.loads(file.read_text()))
            if found.format != FORMAT:
                raise ValueError(f"its format is {found.format}, and this bnjax reads {FORMAT}")
            kinds = {"classes": list, "image_shape": list, "files": dict, "window": dict}
            for name, kind in kinds.items():
                if not isinstance(getattr(found, name), kind):
                    raise ValueError(f"{name} is no {kind.__name__}")
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{file} is damaged, or from another version of bnjax ({type(error).__name__}: "
                f"{error}). Export the run again."
            ) from error
        return found

    def check(self, folder: Path, name: str) -> Path:
        """Returns a file of the model, which is there and as it was written.

        Raises:
            UserError: if it is not.
        """
        file = folder / name
        if not file.is_file():
            raise UserError(
                f"{file} is missing, which {folder / FILE} names. Export the run again."
            )
        if checksum(file.read_bytes()) != self.files.get(name):
            raise UserError(
                f"{file} is damaged: it is not what was written (its SHA-256 differs from the one "
                f"in {FILE}). Copy the folder anew, or export the run again."
            )
        return file


def window(exported: datetime.date, jax_version: str) -> dict[str, Any]:
    """Returns in which versions of JAX an exported program is promised to load.

    What counts is when the two versions of JAX were built, the one that writes and the one that
    reads, and not the day of the export; but no version that is built more than six months after
    that day is within the promise.

    >>> window(datetime.date(2026, 8, 31), "0.10.2")["not_if_built_after"]
    '2027-02-28'
    """
    years, month = divmod(exported.month - 1 + MONTHS_NEWER, 12)
    year, month = exported.year + years, month + 1
    day = min(exported.day, calendar.monthrange(year, month)[1])
    return {
        "written_with_jax": jax_version,
        "months_newer": MONTHS_NEWER,
        "weeks_older": WEEKS_OLDER,
        "not_if_built_after": datetime.date(year, month, day).isoformat(),
    }


def checksum(content: bytes) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
