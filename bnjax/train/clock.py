"""The seconds that training takes, without those of compiling."""

import collections
import functools
import math
import threading
import time

import jax


class Clock:
    """Seconds spent training: not compiling, and not between the end of a step and `restart`.

    Attributes:
        compiling: seconds that were spent compiling in the laps so far.
    """

    def __init__(self) -> None:
        """Starts at once."""
        self.compiling, self._seconds_per_step = 0.0, math.inf
        self.restart()

    def restart(self) -> None:
        """Starts the next lap now."""
        self._last, self._compiled = time.perf_counter(), compile_seconds()

    def lap(self, steps: int) -> float:
        """Ends the steps of one dispatch and returns the seconds that each took."""
        last, compiled = self._last, self._compiled
        self.restart()
        compiling = self._compiled - compiled
        self.compiling += compiling
        self._seconds_per_step = max(self._last - last - compiling, 0.0) / steps
        return self._seconds_per_step

    def steps_in(self, seconds: float) -> int:
        """Returns how many steps take so long, at least 1; 1 before the first one is through."""
        return max(1, int(seconds / max(self._seconds_per_step, 1e-6)))


def compile_seconds() -> float:
    """Returns the seconds that this thread has spent compiling since it first asked."""
    return _by_thread()[threading.get_ident()]


@functools.cache
def _by_thread() -> collections.defaultdict[int, float]:
    """Returns the seconds of each thread, which JAX tells from now on."""
    seconds: collections.defaultdict[int, float] = collections.defaultdict(float)

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            seconds[threading.get_ident()] += duration_secs

    jax.monitoring.register_event_duration_secs_listener(add)
    return seconds
