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
        # Above 0, which what is divided by it wants.
        self._seconds_per_step = max(self._last - last - compiling, 1e-6) / steps
        return self._seconds_per_step

    def steps_in(self, seconds: float) -> int:
        """Returns how many steps take so long, at least 1; 1 before the first one is through."""
        return max(1, int(seconds / self._seconds_per_step))


def compile_seconds() -> float:
    """Returns the seconds that this thread has spent compiling since it first asked."""
    return sum(end - start for start, end in _by_thread()[threading.get_ident()])


@functools.cache
def _by_thread() -> collections.defaultdict[int, list[tuple[float, float]]]:
    """Returns when each thread was compiling, as intervals that do not overlap.

    JAX tells of each part when it is over, and of what it was a part of after that: tracing within
    tracing would be counted twice.
    """
    intervals: collections.defaultdict[int, list[tuple[float, float]]]
    intervals = collections.defaultdict(list)

    def add(event: str, duration_secs: float, **_: str | int) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        mine, end = intervals[threading.get_ident()], time.perf_counter()
        start = end - duration_secs
        while mine and mine[-1][0] >= start:
            mine.pop()
        mine.append((max(start, mine[-1][1]) if mine else start, end))

    jax.monitoring.register_event_duration_secs_listener(add)
    return intervals
