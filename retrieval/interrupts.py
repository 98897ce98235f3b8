"""Ctrl-C and SIGTERM that wait until a step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_interrupts() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether an interrupt has come; a second one interrupts at once.

    Only the main thread can listen; in another nothing is deferred.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    come = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal come
        if come:
            raise KeyboardInterrupt
        come = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
