"""A recipe small enough to be trained in a second, and what is read of a run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from titans_build.tools.training.log import Event

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
COPY = "copy:length=16"


def losses(events: list[Event]) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events if event["event"] == "step"}


def logged(folder: Path) -> list[Event]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


PROGRAM = [sys.executable, "-m", "titans_build.tools.train"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
