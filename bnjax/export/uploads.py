"""What a form brings: images within limits, read as a stream, and choices."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import BinaryIO

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

from bnjax.data.pictures import Picture, pixels, read_picture
from bnjax.export.network import SIZES

TYPE = "multipart/form-data"
IMAGE = "image"  # the name of the fields that have files
MAX_NAME = 100  # characters of a file's name that are repeated
DROP_SECONDS = 2.0
MAX_FIELD = 1024  # bytes of what is no file


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        bytes: of the body.
        images: files in it.
        pixels: of all of its images together, before they are resized.
        seconds: that the body may take to come.
        waiting: how many requests wait while one is computed.
    """

    bytes: int = 8_000_000
    images: int = SIZES[-1]
    pixels: int = 24_000_000
    seconds: float = 30.0
    waiting: int = 16


@dataclasses.dataclass(frozen=True)
class Form:
    """The files of a form, still open, and the rest of it."""

    files: Sequence[UploadFile]
    choices: Mapping[str, str]


async def read_form(request: Request, limits: Limits, choices: Mapping[str, Sequence[str]]) -> Form:
    """Returns the form of a request; whoever calls closes `request`.

    Args:
        request: of the type multipart/form-data; from `Body`.
        limits: that it has to be within.
        choices: the other fields that there may be, and their values, the default first.

    Raises:
        HTTPException: 4xx, if it is not.
    """
    try:
        async with asyncio.timeout(limits.seconds):
            found = await request.form(
                max_files=limits.images, max_fields=len(choices), max_part_size=MAX_FIELD
            )
    except TimeoutError as error:
        raise HTTPException(
            408, f"The body did not come within {limits.seconds:g} seconds. Send it again."
        ) from error
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise HTTPException(
            400,
            f"The form cannot be read: {error.detail} It has 1 to {limits.images} files in fields "
            f"named {IMAGE}, and perhaps {', '.join(choices)}.",
        ) from error
    files: list[UploadFile] = []
    chosen: dict[str, str] = {}
    for name, value in found.multi_items():
        if name == IMAGE and isinstance(value, UploadFile):
            files.append(value)
        elif name == IMAGE:
            raise HTTPException(
                400,
                f"The field {IMAGE} is text. Send a file: curl -F {IMAGE}=@photo.png, with the @.",
            )
        elif name not in choices:
            known = ", ".join([IMAGE, *choices])
            raise HTTPException(400, f"The field {_short(name)!r} is unknown. There are: {known}.")
        elif name in chosen or value not in choices[name]:
            allowed = ", ".join(choices[name])
            raise HTTPException(
                400,
                f"The field {name} is not possible as given. Give it once, as one of: {allowed}.",
            )
        else:
            chosen[name] = str(value)
    if not files:
        raise HTTPException(400, f"There is no image. Send 1 to {limits.images} as {IMAGE}.")
    return Form(files, {name: values[0] for name, values in choices.items()} | chosen)


class Body:
    """The body of a request, of which no more is read than may come."""

    def __init__(self, request: Request, limits: Limits):
        """Wraps a request whose body nobody has read."""
        self._request, self._limits = request, limits
        self._received, self._ended = 0, False

    def counted(self) -> Request:
        """Returns the same request, whose body may be read.

        Raises:
            HTTPException: 413 or 415, at once if its headers say it, or else when it is read.
        """
        headers = self._request.headers
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != TYPE:
            raise HTTPException(
                415, f"The body has to be {TYPE}, which curl -F {IMAGE}=@photo.png sends."
            )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.bytes:
            raise self._too_large()
        return Request(self._request.scope, self._receive)

    async def drop(self) -> bool:
        """Reads on for a while and keeps nothing, so that who sends gets to read the answer.

        Returns whether the body has come to its end.
        """
        if "expect" in self._request.headers:  # waits to be asked for the body
            return self._ended
        most = self._received + 2 * self._limits.bytes
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(self._limits.seconds, DROP_SECONDS)):
                while not self._ended and self._received < most:
                    await self._next()
        return self._ended

    async def _receive(self) -> Message:
        message = await self._next()
        if self._received > self._limits.bytes:
            raise self._too_large()
        return message

    async def _next(self) -> Message:
        message = await self._request.receive()
        self._received += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413,
            f"The body has more than {self._limits.bytes:,} bytes. Send fewer or smaller images.",
        )


def read_images(
    files: Sequence[tuple[str, BinaryIO]], shape: tuple[int, int, int], limits: Limits
) -> list[Picture]:
    """Returns the images of open files with names, each resized to [h, w, c] = `shape`.

    Raises:
        DataError: if one is no PNG or JPEG, or is damaged.
        HTTPException: 413, if they have too many pixels.
    """
    names = [_short(name) or f"image {number}" for number, (name, _) in enumerate(files)]
    found = sum(pixels(file, name) for name, (_, file) in zip(names, files, strict=True))
    if found > limits.pixels:
        raise HTTPException(
            413,
            f"The images have {found:,} pixels and may have {limits.pixels:,} together. Send "
            f"smaller ones: the network takes {shape[1]}x{shape[0]}.",
        )
    return [read_picture(file, name, shape) for name, (_, file) in zip(names, files, strict=True)]


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
