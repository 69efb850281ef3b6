"""The log of a run: events, written to a file of JSON lines and to TensorBoard, and passed to a listener."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...recipes import StorageError
from ...recipes.atomic_write import read_regular
from ..extras import from_extra
from ..terminal import UsageError
from .run_folder import json_text, write_errors, write_file

Event = dict[str, Any]
LOG = "log.jsonl"
SCALARS = {"step": "train", "valid": "valid", "surprise": "surprise"}
"""The events that TensorBoard shows, and the prefix of their tags."""


class EventLog:
    """Events are dictionaries with the key ``event``, their kind. All but ``tick`` are kept in ``history`` and logged.

    Kinds: start, step, valid, documents (the validation of each), surprise, checkpoint, stage, skip, warning, stop,
    end; and tick, every step, for progress bars. ``folder``: the run's; ``None`` in processes that log nothing.
    ``tensorboard``: ``None`` for "if it is installed".
    """

    def __init__(
        self, folder: Path | None, on_event: Callable[[Event], None] | None, *, tensorboard: bool | None = False
    ) -> None:
        self.history: list[Event] = []
        self._folder, self._wanted = folder, tensorboard
        self._listener = on_event if folder is not None else None
        self._tensorboard: TensorBoardLog | None = None
        self.unheard = False
        """Whether the listener's output was closed (`| head`). It is called no more."""

    def open(self, step: int) -> None:
        """Begin after ``step`` steps. Events of later steps, from before the run was resumed, are removed."""
        if self._folder is None:
            return
        path = self._folder / LOG
        if path.exists():
            self.history = [event for event in read_log(path) if event.get("step", 0) <= step]
            write_file(path, "".join(map(json_text, self.history)))
        if self._wanted is False:
            return
        try:
            from_extra("tensorboard", "train", "tensorboard: true")
            self._tensorboard = TensorBoardLog(self._folder / "tensorboard", step)
        except UsageError as error:
            if self._wanted:
                raise
            self.emit("warning", step=step, message=f"no TensorBoard logs: {str(error).partition(' needs ')[2]}")
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
                file.write(json_text(event))
        if self._tensorboard is not None:
            try:
                self._tensorboard.add(event)
            except OSError as error:
                self._stop_tensorboard(event["step"], error)
        if self._listener is not None:
            try:
                self._listener(event)
            except BrokenPipeError:
                self._listener, self.unheard = None, True

    def close(self) -> None:
        """Finish the TensorBoard logs."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


class TensorBoardLog:
    """Scalars in an event file of TensorBoard. ``step``: the last one that stays of earlier files.

    TensorBoard's own writer uses a thread, where a full disk goes unnoticed; this one raises ``OSError``.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._file = open(folder / f"events.out.tfevents.{time.time():.6f}.titans", "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if step:
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, event: Event) -> None:
        """Add the numbers of an event, if it is of a kind in ``SCALARS``."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        prefix = SCALARS.get(event["event"])
        if prefix is None:
            return
        means = {path: memory.get("mean") for path, memory in event.get("memories", {}).items()}
        values = [
            Summary.Value(tag=f"{prefix}/{name}", simple_value=number)
            for name, number in {**event, **means}.items()
            if name != "step" and isinstance(number, (int, float))
        ]
        self._write(step=event["step"], summary=Summary(value=values))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto import event_pb2

        self._records.write(event_pb2.Event(wall_time=time.time(), **fields).SerializeToString())
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()


def read_log(path: Path) -> list[Event]:
    """The events of a log file; none if there is no file. A line left incomplete by a killed process is skipped."""
    try:
        lines = read_regular(path).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise StorageError(f"{path}: expected the log of a run: {error.strerror or error}") from None
    return [event for line in lines if (event := parse_event(line)) is not None]


def parse_event(line: str) -> Event | None:
    """The event in a line of JSON; ``None`` if the line is anything else."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and type(event.get("step", 0)) is int else None


def _nonfinite_to_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _nonfinite_to_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_nonfinite_to_null(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
