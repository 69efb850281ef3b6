"""A recipe and settings for runs of a second, and what their logs say."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titans_build.tools.training import TrainedRun, train

TINY: dict[str, Any] = {
    "version": 1,
    "dim": 16,
    "vocab": 16,
    "layers": {
        "mac": [
            {
                "type": "context",
                "segment": 8,
                "persistent": 2,
                "memory": {"type": "memory", "heads": 2, "expansion": 2, "chunk": 4},
                "attend": {"type": "attention", "heads": 2},
            },
            "ffn",
        ],
        "mag": [
            {
                "type": "persistent",
                "tokens": 2,
                "of": {
                    "type": "gate",
                    "branches": [
                        {"type": "attention", "heads": 2, "window": 8},
                        {"type": "memory", "heads": 2, "expansion": 2, "chunk": 4},
                    ],
                },
            }
        ],
    },
    "stack": ["mac", "mag"],
}
QUICK: dict[str, Any] = {
    "steps": 6,
    "batch": 4,
    "log_every": 1,
    "valid_every": None,
    "checkpoint_every": None,
    "surprise_every": None,
    "tensorboard": False,
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the commands that a test starts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def tiny() -> dict[str, Any]:
    """A recipe of two layers and 16 tokens."""
    return copy.deepcopy(TINY)


@pytest.fixture
def quick() -> dict[str, Any]:
    """Settings of a run that only trains, and logs every step."""
    return dict(QUICK)


@pytest.fixture
def quick_train(tmp_path: Path) -> Callable[..., TrainedRun]:
    """``quick_train(steps=3)`` in a folder of the test's own, or in another, ``out``."""

    def run(
        *,
        recipe: Any = TINY,
        data: Any = "copy:length=16",
        out: str = "run",
        resume: bool = False,
        on_event: Any = None,
        **settings: Any,
    ) -> TrainedRun:
        defaults = {key: value for key, value in QUICK.items() if key != "steps" or "stages" not in settings}
        given = settings if resume else {**defaults, **settings}
        return train(recipe, data, given, tmp_path / out, resume=resume, on_event=on_event)

    return run


@pytest.fixture
def ordered_text(tmp_path: Path) -> dict[str, Any]:
    """Documents that are read in order, with state carried along; they need a vocabulary of 256."""
    for number in range(6):
        text = "".join(f"{number}: line {line} of a text that goes on. " for line in range(20 + number))
        (tmp_path / f"document-{number}.txt").write_text(text, encoding="utf-8")
    return {"text": [str(tmp_path / "document-*.txt")], "documents": "ordered", "length": 16, "valid": 0.2}


@pytest.fixture
def packed_text(tmp_path: Path) -> dict[str, Any]:
    """Lines of 1 to 40 bytes, several in a row of 24; they need a vocabulary of 256."""
    lines = [f"{number}: " + "abc def " * (number % 5) + "x" * (number % 3) for number in range(120)]
    (tmp_path / "lines.txt").write_text("\n".join(lines), encoding="utf-8")
    text = {"text": str(tmp_path / "lines.txt"), "lines": True, "pack": "documents"}
    return {**text, "length": 24, "valid": 0.2, "test": 0}


@pytest.fixture
def logged() -> Callable[[Path], list[dict[str, Any]]]:
    """``logged(folder)``: the events in a run's log file."""
    return lambda folder: [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def losses() -> Callable[[list[dict[str, Any]]], dict[int, float]]:
    """``losses(events)``: the loss of every logged step."""
    return lambda events: {event["step"]: event["loss"] for event in events if event["event"] == "step"}
