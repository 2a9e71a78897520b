"""Ctrl-C, told apart from a KeyboardInterrupt that some code raises for reasons of its own."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noticing_ctrl_c() -> Iterator[threading.Event]:
    """Yield an event that is set once a SIGINT comes, which is handled as it would be without.

    Signals reach the main thread alone: in others, and where no Python function handles them, the
    event stays as it is.
    """
    pressed, before = threading.Event(), signal.getsignal(signal.SIGINT)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def note(number: int, frame: FrameType | None) -> None:
        pressed.set()
        before(number, frame)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
