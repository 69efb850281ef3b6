"""The log of a run: events, written to a file of JSON lines and to TensorBoard, and passed to a listener."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..extras import from_extra
from ..terminal import UsageError
from .run_folder import write_errors, write_text

Event = dict[str, Any]
LOG = "log.jsonl"
SCALARS = {"step": "train", "valid": "valid", "surprise": "surprise"}
"""The events that TensorBoard shows, and the prefix of their tags."""


class EventLog:
    """Events are dictionaries with the key ``event``, their kind. All but ``tick`` are kept in ``history`` and logged.

    Kinds: start, step, valid, surprise, checkpoint, stage, skip, warning, stop, end; and tick, every step, for
    progress bars. ``folder``: the run's; ``None`` in processes that log nothing. ``tensorboard``: ``None`` for
    "if it is installed".
    """

    def __init__(
        self, folder: Path | None, on_event: Callable[[Event], None] | None, *, tensorboard: bool | None = False
    ) -> None:
        self.history: list[Event] = []
        self._folder, self._wanted = folder, tensorboard
        self._listener = on_event if folder is not None else None
        self._tensorboard: TensorBoardLog | None = None

    def open(self, step: int) -> None:
        """Begin after ``step`` steps. Events of later steps, from before the run was resumed, are removed."""
        if self._folder is None:
            return
        path = self._folder / LOG
        if path.exists():
            self.history = [event for event in read_log(path) if event.get("step", 0) <= step]
            write_text(path, "".join(map(_line, self.history)))
        if self._wanted is not False:
            self._open_tensorboard(step)

    def _open_tensorboard(self, step: int) -> None:
        assert self._folder is not None
        try:
            from_extra("tensorboard", "train", "tensorboard: true")
        except UsageError as error:
            if self._wanted:
                raise
            self.emit("warning", step=step, message=f"no TensorBoard logs: {str(error).partition(' needs ')[2]}")
            return
        try:
            self._tensorboard = TensorBoardLog(self._folder / "tensorboard", step)
        except OSError as error:
            self._stop_tensorboard(step, error)

    def _stop_tensorboard(self, step: int, error: OSError) -> None:
        self.close()
        self.emit("warning", step=step, message=f"no more TensorBoard logs: {error.strerror or error}")

    def emit(self, kind: str, **fields: Any) -> None:
        """Log one event. ``fields``: JSON; nonfinite numbers are written as null."""
        event = _nonfinite_to_null({"event": kind, **fields})
        if self._folder is not None and kind != "tick":
            self.history.append(event)
            path = self._folder / LOG
            with write_errors(path), open(path, "a", encoding="utf-8") as file:
                file.write(_line(event))
        if self._tensorboard is not None:
            try:
                self._tensorboard.add(event)
            except OSError as error:
                self._stop_tensorboard(event["step"], error)
        if self._listener is not None:
            self._listener(event)

    def close(self) -> None:
        """Finish the TensorBoard logs."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


class TensorBoardLog:
    """Scalars in a folder. ``step``: the last one to keep of an earlier log.

    TensorBoard writes in its own thread. An ``OSError`` there, such as a full disk, is raised by the next call.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._before = threading.excepthook
        threading.excepthook = self._excepthook
        try:
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        except BaseException:
            threading.excepthook = self._before
            raise

    def add(self, event: Event) -> None:
        """Add the numbers of an event, if it is of a kind in ``SCALARS``."""
        if event["event"] not in SCALARS:
            return
        for name, value in event.items():
            for path, number in value.items() if isinstance(value, dict) else [("", value)]:
                if isinstance(number, dict):
                    number = number.get("mean")
                if isinstance(number, (int, float)) and name != "step":
                    self._writer.add_scalar(f"{SCALARS[event['event']]}/{path or name}", number, event["step"])

    def close(self) -> None:
        """Finish the files, as far as possible."""
        with contextlib.suppress(OSError):
            self._writer.close()
        if threading.excepthook == self._excepthook:
            threading.excepthook = self._before

    def _excepthook(self, died: threading.ExceptHookArgs) -> None:
        # add() raises what the writing thread died of; its traceback would only be noise
        if not (isinstance(died.exc_value, OSError) and type(died.thread).__module__.startswith("tensorboard.")):
            self._before(died)


def read_log(path: Path) -> list[Event]:
    """The events of a log file; none if there is no file. A line left incomplete by a killed process is skipped."""
    events: list[Event] = []
    if not path.exists():
        return events
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def _line(event: Event) -> str:
    return json.dumps(event, ensure_ascii=False, allow_nan=False) + "\n"


def _nonfinite_to_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nonfinite_to_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nonfinite_to_null(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
