"""SIGTERM and Ctrl-C during a run: a wish to stop, heard at the end of the step.

Knows signals; knows no training.
"""

import signal
import threading
from typing import Any


class Stopping:
    """Hears the signals while it is entered; in a thread other than the main one it hears nothing.

    Attributes:
      reason: "SIGTERM" or "SIGINT" once one has come, else None. A second Ctrl-C interrupts at
        once.
    """

    def __init__(self):
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _heard(self, number: int, _: Any) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name
