"""Handling of Ctrl-C, SIGTERM and SIGHUP: unfinished output is removed, and the message names complete files."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # not every system has the last


class Stopped(BaseException):
    """Raised when the user or the system stops the command by a signal."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Context in which these signals raise Stopped; a signal that was ignored, as under nohup, still is."""
    process, before = os.getpid(), {}

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked child ends as it always did
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise Stopped(number)

    if threading.current_thread() is threading.main_thread():
        for number in [getattr(signal, name) for name in NAMES if hasattr(signal, name)]:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
