"""A download that gives up soon, is verified, and leaves nothing half-written.

TensorFlow Datasets' manager does the work. It tries again for minutes and cannot be interrupted, so
it runs in a process of its own, `python -m bnjax.data.download`, which ends when nothing comes any
more or when whoever wanted the file is gone.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from bnjax.data.tfds import import_tfds
from bnjax.errors import DataError

STALL_SECONDS = 10.0  # a download that receives nothing for so long is given up
ABANDONED_SECONDS = (
    60.0  # a draft that nobody writes to for so long belongs to a process that was killed
)


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file on a server, and how to know that it is the right one."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """The file's name."""
        return self.url.rpartition("/")[2]


def download(file: Remote, cache: Path, stall_seconds: float = STALL_SECONDS) -> Path:
    """Returns the file in the cache folder after downloading it.

    It appears there whole and verified, or not at all.

    Args:
        file: which, and how to know it.
        cache: the folder.
        stall_seconds: for how long nothing may come before it is given up.

    Raises:
        DataError: when the server cannot be reached, stops sending or sends other bytes, or the
            cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache)
        draft = Path(tempfile.mkdtemp(prefix="download-", dir=cache))
        try:
            return _fetch(file, draft, stall_seconds).replace(
                cache / file.name
            )  # one step, so that two processes may do it at once
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"the cache folder {cache} cannot be written ({error.strerror}); choose another with "
            "BNJAX_CACHE"
        ) from error


def _fetch(file: Remote, folder: Path, stall_seconds: float) -> Path:
    command = [
        sys.executable,
        "-m",
        "bnjax.data.download",
        file.url,
        str(file.size),
        file.sha256,
        str(folder),
        str(stall_seconds),
    ]
    paths = os.pathsep.join(filter(None, sys.path))  # it finds the packages that this process found
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    said = done.stdout.strip()
    if done.returncode != 0:
        raise DataError(
            f"{file.url} could not be downloaded: "
            f"{said or 'the download process ended without a word'}"
        )
    return Path(said)


def _remove_abandoned(cache: Path) -> None:
    for draft in cache.glob("download-*"):
        with contextlib.suppress(OSError):  # its owner may be just tidying up
            if (
                time.time() - max(path.stat().st_mtime for path in [draft, *draft.rglob("*")])
                > ABANDONED_SECONDS
            ):
                shutil.rmtree(draft)


def main(url: str, size: str, sha256: str, folder: str, stall_seconds: str) -> int:
    """Downloads into the folder and prints the file's path, or one line that says what failed.

    Returns the exit code.
    """
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches both processes; the other one ends this one
    parent = os.getppid()
    outcome: list[tuple[int, str]] = []
    manager = _manager(url, size, sha256, folder)
    thread = threading.Thread(target=lambda: outcome.append(_attempt(manager, url)), daemon=True)
    thread.start()
    received, since = -1, time.monotonic()
    while thread.is_alive():
        thread.join(0.1)
        now = _bytes_in(Path(folder))
        if os.getppid() != parent:
            shutil.rmtree(folder, ignore_errors=True)
            return 1
        if now > received:
            received, since = now, time.monotonic()
        elif time.monotonic() - since > float(stall_seconds):
            what = (
                f"no more came after {received:,} of {int(size):,} bytes"
                if received
                else "there was no answer (is there a network?)"
            )
            outcome.append((1, f"{what}, for {float(stall_seconds):g} s"))
            break
    code, said = outcome[0]
    print(said, flush=True)
    return code


def _manager(url: str, size: str, sha256: str, folder: str) -> Any:
    tfds = import_tfds()
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # its word on each of its attempts
    tfds.display_progress_bar(sys.stderr.isatty())
    info = tfds.download.checksums.UrlInfo(size=int(size), checksum=sha256, filename=None)
    return tfds.download.DownloadManager(
        download_dir=folder, url_infos={url: info}, force_checksums_validation=True
    )


def _attempt(manager: Any, url: str) -> tuple[int, str]:
    try:
        return 0, str(manager.download(url))
    except (
        Exception
    ) as error:  # requests, TFDS and the file system each have their own; all mean "no download"
        if type(error).__name__ == "NonMatchingChecksumError":
            return 1, "what came is not the official file, its size or checksum differs"
        return 1, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _bytes_in(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):  # a file is moved to its place when it is complete
        for path in folder.rglob("*"):
            total += path.stat().st_size if path.is_file() else 0
    return total


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    os._exit(code)  # without waiting for the manager's threads, which may go on trying
