"""The log of a run: its file and TensorBoard's."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from titans_build.tools.terminal import CommandFailed
from titans_build.tools.training.log import EventLog, read_log


def test_tensorboard_scalars(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # the second log resumes after step 1: the first one's step 2 is purged
    for first, loss in ((0, 1.0), (1, 2.0)):
        log = EventLog(tmp_path, None, tensorboard=True)
        log.open(first)
        for step in range(first + 1, 3):
            log.emit("step", step=step, loss=loss / step)
            log.emit("surprise", step=step, memories={"a": {"mean": 3.0}})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 1.0)]
    assert [event.value for event in events.Scalars("surprise/a")] == [3.0, 3.0]


def test_lines_that_are_no_events_are_skipped(tmp_path: Path) -> None:
    lines = ['{"event": "start"}', '{"event": "valid", "step": "x"}', "[" * 100_000, "7", '{"event": "st']
    (tmp_path / "log.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_log(tmp_path / "log.jsonl") == [{"event": "start"}]
    assert read_log(tmp_path / "none.jsonl") == []


def test_full_disk_stops_tensorboard_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*rest: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    events: list[dict[str, Any]] = []
    log = EventLog(tmp_path, events.append, tensorboard=True)
    log.open(0)
    monkeypatch.setattr(RecordWriter, "write", full)
    for step in (1, 2):
        log.emit("step", step=step, loss=1.0)
    assert [event["message"] for event in events if event["event"] == "warning"] == [
        "no more TensorBoard logs: No space left on device"
    ]


def test_unwritable_log(tmp_path: Path) -> None:
    log = EventLog(tmp_path, None, tensorboard=False)
    log.open(0)
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(CommandFailed, match=r"log\.jsonl: cannot be written: Is a directory"):
        log.emit("step", step=1, loss=1.0)
