"""One thread that computes, and a bounded number of places before it."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Busy(Exception):
    """No place is free."""


class Worker:
    """Computes one thing after the other, off the thread that answers.

    A place is taken before a request's body is read, so that what is in memory is bounded by the
    number of places, and not by that of the clients. To be used from one event loop.
    """

    def __init__(self, places: int):
        """Has as many places, that of whoever is served included."""
        self._free = places
        self._thread = ThreadPoolExecutor(1, "network")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Holds a place.

        Raises:
            Busy: if there is none.
        """
        if self._free == 0:
            raise Busy
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1

    async def do(self, function: Callable[..., T], *args: Any) -> T:
        """Returns what a function returns, from the thread, in the order of the calls."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    def close(self) -> None:
        """Ends the thread, after what it is at."""
        self._thread.shutdown(cancel_futures=True)
