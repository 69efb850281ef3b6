"""Running the command line inside the test's own process, and a recipe small enough to be run often."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
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


class Ended(NamedTuple):
    """A process that has ended."""

    status: int
    out: bytes
    err: bytes
    peak: int
    """The most memory it held, in KiB."""


class ForkServer:
    """Runs console scripts in processes of their own, which need not import torch again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "fork_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "COLUMNS": "100"},
        )

    def begin(self, requests: list[Any]) -> list[int]:
        """The numbers of the processes."""
        assert self.server.stdin is not None and self.server.stdout is not None
        print(json.dumps(requests), file=self.server.stdin, flush=True)
        numbers: list[int] = json.loads(self.server.stdout.readline())
        return numbers

    def end(self) -> list[tuple[int, int]]:
        """The statuses and the memory of the processes that ``begin`` started, at their end."""
        assert self.server.stdout is not None
        ends: list[tuple[int, int]] = json.loads(self.server.stdout.readline())
        return ends

    def start(self, module: str, *words: object, pipe: str) -> int:
        """Start ``module.run()`` and return its number. ``pipe``: ``stdin`` or ``stdout``, a pipe of that name."""
        names = {name: self.folder / name for name in ("stdin", "stdout", "stderr")}
        for name, path in names.items():
            path.unlink(missing_ok=True)
            os.mkfifo(path) if name == pipe else path.touch()
        files = [str(path) for path in names.values()]
        return self.begin([[f"titans_build.tools.{module}", list(map(str, words)), files, {}]])[0]

    def __call__(
        self,
        module: str,
        *words: object,
        stdin: bytes = b"",
        stdout: str | None = "out",
        stderr: str = "err",
        reader: str | None = None,
        environment: tuple[dict[str, str], ...] = ({},),
    ) -> list[Ended]:
        """``module.run()`` with ``words`` as the command line, in as many processes as there are ``environment``.

        ``stdout``: another file, or ``None`` for a closed one; ``stderr="out"``: the same. ``reader``: a command that
        reads what is written, and whose output is returned instead.
        """
        (self.folder / "in").write_bytes(stdin)
        requests, names = [], []
        for number, changes in enumerate(environment):
            out, err = (self.folder / f"{name}-{number}" for name in ("out", "err"))
            out.unlink(missing_ok=True)
            err.unlink(missing_ok=True)
            target = stdout and {"out": str(out)}.get(stdout, stdout)
            if reader is not None:
                target = str(self.folder / "pipe")
                os.mkfifo(target)
                reading = subprocess.Popen(f"{reader} < {target} > {out}", shell=True)
            errors = {"err": str(err), "out": target}.get(stderr, stderr)
            files = [str(self.folder / "in"), target, errors]
            requests.append([f"titans_build.tools.{module}", list(map(str, words)), files, changes])
            names.append((out, err))
        self.begin(requests)
        ends = self.end()
        if reader is not None:
            reading.wait(60)
            (self.folder / "pipe").unlink()
        contents = [[file.read_bytes() if file.exists() else b"" for file in each] for each in names]
        return [Ended(status, *content, peak) for (status, peak), content in zip(ends, contents)]


@pytest.fixture(scope="session")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """``in_process("cli", "check", "mac")`` -> the process of a console script after its end, in a list of one."""
    server = ForkServer(tmp_path_factory.mktemp("processes"))
    yield server
    assert server.server.stdin is not None
    server.server.stdin.close()
    server.server.wait(60)
