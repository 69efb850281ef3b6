"""A small model on disk, and the command run inside the test's own process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import titans_build as tb
from titans_build.blocks.language_model import LanguageModel
from titans_build.tools.infer import main

SMALL = {
    "version": 1,
    "name": "small",
    "dim": 16,
    "vocab": 256,
    "layers": {
        "mac": [
            {
                "type": "context",
                "segment": 16,
                "persistent": 2,
                "memory": {"type": "memory", "heads": 2, "expansion": 2, "chunk": 4},
                "attend": {"type": "attention", "heads": 2},
            },
        ],
        "mag": [{"type": "gate", "branches": [{"type": "attention", "heads": 2, "window": 8}, {"type": "memory"}]}],
    },
    "stack": ["mag", "mac"],
}


class Input:
    """Standard input that is no terminal."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BufferedReader(io.BytesIO(content))  # type: ignore[arg-type]

    def isatty(self) -> bool:
        return False


@pytest.fixture
def infer(run_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``infer(folder, "hello", stdin=b"")`` -> status, standard output, standard error."""

    def run(*words: object, stdin: bytes = b"") -> Any:
        monkeypatch.setattr(sys, "stdin", Input(stdin))
        return run_command(main, *words)

    return run


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return tb.build(tb.load_recipe(SMALL), seed=0)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, model: LanguageModel) -> Path:
    place = tmp_path_factory.mktemp("models") / "small"
    tb.save(model, place)
    return place


@pytest.fixture
def run_folder(tmp_path: Path, model: LanguageModel) -> Path:
    tb.save(model, tmp_path / "run" / "model")
    return tmp_path / "run"
