"""Logs for TensorBoard, where it is installed: the numbers of a run's events as curves."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

KINDS = {"step": "train", "valid": "valid", "surprise": "surprise"}
"""Events that have numbers to draw, and what their curves are called."""


class Board:
    """Curves in a folder. ``step``: the last one that is there already; later ones are of a course that was left.

    TensorBoard writes in a thread of its own: an ``OSError`` of it, that the disk is full for one, is raised at the
    next call.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._before = threading.excepthook
        threading.excepthook = self._hear
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        except BaseException:
            threading.excepthook = self._before
            raise

    def draw(self, event: dict[str, Any]) -> None:
        """Add the numbers of an event; one without is let pass."""
        if event["event"] not in KINDS:
            return
        for name, value in event.items():
            for path, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, dict):
                    number = number.get("mean")
                if isinstance(number, (int, float)) and name != "step":
                    self._writer.add_scalar(f"{KINDS[event['event']]}/{path or name}", number, event["step"])

    def close(self) -> None:
        """Finish the files, as far as that can be done."""
        with contextlib.suppress(OSError):
            self._writer.close()
        if threading.excepthook == self._hear:
            threading.excepthook = self._before

    def _hear(self, died: threading.ExceptHookArgs) -> None:
        # what the writing thread died of is raised here, and its trace would be all that is seen of it
        if not (isinstance(died.exc_value, OSError) and type(died.thread).__module__.startswith("tensorboard.")):
            self._before(died)
