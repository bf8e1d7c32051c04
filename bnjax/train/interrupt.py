"""Being told to stop, politely: Ctrl-C and SIGTERM wait for the end of a step."""

import signal
import threading
from types import FrameType


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `signal`.

    A second one ends the program at once.

    An exception in the middle of a step would find its inputs donated and its outputs not there
    yet. In another thread than the main one, where Python allows no handlers, nothing changes.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(self) -> None:
        """Has received nothing yet."""
        self.signal: signal.Signals | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
