"""Quick runs in a folder of the test's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import COPY, QUICK, TINY

from titans_build.tools.training import TrainedRun, train

Train = Callable[..., TrainedRun]


@pytest.fixture
def tiny() -> dict[str, Any]:
    return copy.deepcopy(TINY)


@pytest.fixture
def quick_train(tmp_path: Path) -> Train:
    """``quick_train(steps=3)`` in a folder of the test's own, or in another, ``out``."""

    def run(
        *,
        recipe: Any = TINY,
        data: Any = COPY,
        out: str = "run",
        resume: bool = False,
        on_event: Any = None,
        **settings: Any,
    ) -> TrainedRun:
        usual = {key: value for key, value in QUICK.items() if key != "steps" or "stages" not in settings}
        given: Mapping[str, Any] = settings if resume else {**usual, **settings}
        return train(recipe, data, given, tmp_path / out, resume=resume, on_event=on_event)

    return run


@pytest.fixture
def lines_of_text(tmp_path: Path) -> dict[str, Any]:
    """Documents that are read in order, with state carried along; they need a vocabulary of 256."""
    for number in range(6):
        text = "".join(f"{number}: line {line} of a text that goes on. " for line in range(20 + number))
        (tmp_path / f"document-{number}.txt").write_text(text, encoding="utf-8")
    return {"text": [str(tmp_path / "document-*.txt")], "documents": "ordered", "length": 16, "valid": 0.2}
