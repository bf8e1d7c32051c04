"""Stops training after Ctrl-C or SIGTERM, once the current step is saved."""

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any


class Stopped(Exception):
    """Training was stopped by Ctrl-C or SIGTERM and is saved up to `step`.

    The step is None if the signal arrived between two runs.
    """

    def __init__(self, step: int | None, received: signal.Signals):
        """Stores the last complete step and the signal."""
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {received.name}{after}")
        self.step, self.signal = step, received


class StopRequest:
    """A context in which the first SIGINT or SIGTERM only sets `signal`; another ends the program.

    An exception during a step would lose both the donated inputs and the outputs of the step. The
    context has no effect outside the main thread, where Python allows no signal handlers.

    Attributes:
        signal: the received signal, or None.
        failure: the first error raised by a function from `guarding`, or None.
    """

    def __init__(self) -> None:
        """Sets both attributes to None."""
        self.signal: signal.Signals | None = None
        self.failure: Exception | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def guarding(self, function: Callable[..., None]) -> Callable[..., None]:
        """Wraps a function so that its first error is stored and stops training like a signal."""

        def guarded(*arguments: Any) -> None:
            try:
                if self.failure is None:
                    function(*arguments)
            except Exception as error:
                self.failure, self.signal = error, self.signal or signal.SIGTERM

        return guarded

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self.__exit__()
