"""What happens in a run, as events: to the log file, to TensorBoard, and to whoever listens."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...recipes.replacing import replacing
from ..extras import from_extra
from .board import Board
from .folder import writing

Event = dict[str, Any]
LOG = "log.jsonl"


class Journal:
    """Events are plain dictionaries with an ``event``: its kind. All but ``tick`` are kept, and written to the log.

    start, step, valid, surprise, checkpoint, stage, skip, warning, stop, end; and tick, every step, for progress bars.
    """

    def __init__(
        self, folder: Path | None, on_event: Callable[[Event], None] | None, *, tensorboard: bool | None = False
    ) -> None:
        """``folder``: the run's; ``None`` in processes that keep no books. ``tensorboard``: ``None``, if installed."""
        self.history: list[Event] = []
        self._path = None if folder is None else folder / LOG
        self._listener = on_event if folder is not None else None
        self._folder, self._wanted = folder, tensorboard
        self._board: Board | None = None

    def open(self, step: int) -> None:
        """Begin after ``step`` steps: what an earlier course of the run has written of later ones is taken out."""
        if self._path is None or self._folder is None:
            return
        if self._path.exists():
            self.history = [event for event in read_log(self._path) if event.get("step", 0) <= step]
            with writing(self._path), replacing(self._path) as path:
                path.write_text("".join(map(_line, self.history)), encoding="utf-8")
        if self._wanted is not False:
            self._open_board(self._folder / "tensorboard", step)

    def _open_board(self, folder: Path, step: int) -> None:
        from ..terminal import UsageError

        try:
            from_extra("tensorboard", "train", "tensorboard: true")
        except UsageError as error:
            if self._wanted:
                raise
            self.say("warning", step=step, message=f"no TensorBoard logs: {str(error).partition(' needs ')[2]}")
            return
        try:
            self._board = Board(folder, step)
        except OSError as error:
            self._lose_board(step, error)

    def _lose_board(self, step: int, error: OSError) -> None:
        if self._board is not None:
            self._board.close()
            self._board = None
        self.say("warning", step=step, message=f"no more TensorBoard logs: {error.strerror or error}")

    def say(self, kind: str, **fields: Any) -> None:
        """One event. ``fields``: JSON; numbers that are none (NaN, infinity) are written as null."""
        event = _plain({"event": kind, **fields})
        if self._path is not None and kind != "tick":
            self.history.append(event)
            with writing(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(event))
        if self._board is not None:
            try:
                self._board.draw(event)
            except OSError as error:
                self._lose_board(event["step"], error)
        if self._listener is not None:
            self._listener(event)

    def close(self) -> None:
        """Finish the TensorBoard logs."""
        if self._board is not None:
            self._board.close()
            self._board = None


def read_log(path: Path) -> list[Event]:
    """The events of a log; what a kill has left half written at its end is left out."""
    events = []
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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
