"""Running the command line inside the test's own process, and a recipe small enough to be run often."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from titans_build.registry.catalogue import BLOCKS
from titans_build.tools.cli import main

SMALL = """
version: 1
name: small
dim: 32
vocab: 256
layers:
  mac:
    - type: context
      segment: 16
      persistent: 3
      memory: {type: memory, heads: 2, expansion: 2, chunk: 4}
      attend: {type: attention, heads: 2}
    - ffn
  mag:
    - type: persistent
      tokens: 3
      of: {type: gate, branches: [{type: attention, heads: 2, window: 8}, {type: memory, heads: 2, expansion: 2}]}
    - ffn
stack: [{repeat: 2, of: [mag]}, mac]
"""


class Result(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def no_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output is captured, and wide, whatever the terminal is that the tests are run from."""
    monkeypatch.delenv("COLUMNS", raising=False)


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """``run_command(main, "check", "mac")`` -> status, standard output, standard error."""

    def run(main: Callable[[list[str]], int], *words: object) -> Result:
        status = main([str(word) for word in words])
        return Result(status, *capsys.readouterr())

    return run


@pytest.fixture
def titans_build(run_command: Callable[..., Result]) -> Callable[..., Result]:
    """``titans_build("check", "mac")`` -> status, standard output, standard error."""
    return partial(run_command, main)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("a memory that learns while it reads. " * 40, encoding="utf-8")
    return path


@pytest.fixture
def bottleneck() -> Iterator[None]:
    """The block ``bottleneck`` is registered; afterwards it is not, and a recipe can import its module once more."""
    module = "titans_build.tools.tasks.bottleneck"
    importlib.import_module(module)
    yield
    del BLOCKS._entries["bottleneck"], sys.modules[module]
