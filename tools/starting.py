"""Ctrl-C while a command is being loaded, which takes seconds: it leaves with one line, as it does later on.

The package imports this before everything else. Nothing happens unless one of the package's commands is what runs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

COMMANDS = ("titans-build", "titans-train", "titans-infer", "titans-analyze")

_name = os.path.basename(sys.argv[0]).removesuffix(".exe") if sys.argv else ""


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, f"{_name}: error: interrupted\n".encode())
    os._exit(128 + number)


def over() -> None:
    """From now on Ctrl-C is what it is in any program."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# where it is ignored, as in a shell's background jobs, it stays so
_usual = threading.current_thread() is threading.main_thread() and (
    signal.getsignal(signal.SIGINT) is signal.default_int_handler
)
if _name in COMMANDS and _usual:
    signal.signal(signal.SIGINT, _leave)
