"""SIGINT and SIGTERM end what is under way in good order."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals(announcement: str | None, *, twice_ends: bool = True) -> Iterator[list[str]]:
    """Names of the stop signals received so far, for the caller to act on; always empty outside the main thread.

    announcement: what the first one says on stderr, after its name. twice_ends: a second one raises KeyboardInterrupt.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def receive(number: int, frame: object) -> None:
        if received and twice_ends:
            raise KeyboardInterrupt
        received.append(signal.Signals(number).name)
        if announcement is not None and len(received) == 1:
            print(f"fpsim: {received[0]}: {announcement}", file=sys.stderr)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
