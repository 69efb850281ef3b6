"""Signals that ask a process to end: Ctrl-C, SIGTERM, and SIGHUP of a terminal that closes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

Handler = Callable[[int, "FrameType | None"], Any]
TERMINATION = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextlib.contextmanager
def handling(handler: Handler, numbers: tuple[int, ...] = TERMINATION) -> Iterator[None]:
    """Handle signals with ``handler`` in a ``with`` block. Those that the process was started to ignore stay ignored.

    Only the main thread handles signals; in others this does nothing.
    """
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in numbers}
        before = {number: known for number, known in before.items() if known not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, handler)
        yield
    finally:
        for number, known in before.items():
            signal.signal(number, known)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP ends the process, with the status of the signal, after the ``finally`` blocks."""

    def __init__(self, number: int, message: str = "interrupted") -> None:
        super().__init__(128 + number)
        self.number, self.message = number, message


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """A handler that raises ``Terminated``."""
    raise Terminated(number)
