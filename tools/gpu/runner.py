"""Runs cases as processes, each with a time limit of its own, and keeps their results as they come.

A case that crashes, hangs or fails loses no rows but those it has not sent yet. Processes are forked from a server that
has imported PyTorch and has not touched CUDA: each has a CUDA context of its own, and starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple, TextIO

Row = dict[str, Any]
PRELOADED = "titans_build.tools.gpu.preload"
KEPT_OUTPUT = 1500
"""Characters of what a failed case printed that its row keeps."""


class Case(NamedTuple):
    """One process."""

    stage: str
    name: str
    function: Callable[..., Iterable[Row]]
    """Of a module, so that a new process finds it. It yields rows."""
    arguments: Row
    limit: float = 60.0
    """Seconds after which the process is ended."""


class Stage(NamedTuple):
    """Cases with a share of the time. What a stage does not need goes to the following ones."""

    name: str
    seconds: float
    cases: Sequence[Case]
    at_once: int = 1


class Results:
    """The rows so far, each written to ``rows.jsonl`` in ``folder`` when it is added."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[Row] = []
        self.left_out: list[str] = []
        self.say = say
        self._file: TextIO = (folder / "rows.jsonl").open("w", encoding="utf-8")

    def add(self, case: Case, row: Row) -> None:
        row = {"stage": case.stage, "case": case.name, **finite(row)}
        self.rows.append(row)
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.say(in_a_line(row))


def finite(value: Any) -> Any:
    """``None`` for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def in_a_line(row: Row) -> str:
    shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items() if v not in (None, "", [], {})}
    return "  ".join(f"{key} {value}" for key, value in shown.items())[:400]


def start_server() -> None:
    """Start the server that processes are forked from. It imports while this process goes on."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    threading.Thread(target=context.Process(target=time.time).start, daemon=True).start()


def run(
    stages: Sequence[Stage], results: Results, end: float, background: Stage | None = None, start: str = "forkserver"
) -> None:
    """Run the stages in order until ``end`` (of ``time.monotonic``), and ``background`` beside them.

    A stage starts no case after its share of the time; what it leaves comes after the last stage, if there is time.
    What was not run, or was ended with everything else at ``end``, is in ``results.left_out``. ``start``: how
    ``multiprocessing`` starts a process.
    """
    pool = _Pool(multiprocessing.get_context(start), results, end)
    beside = deque(background.cases if background else ())
    later: deque[Case] = deque()
    shares = itertools.accumulate((stage.seconds for stage in stages), initial=time.monotonic())
    next(shares)
    try:
        last = Stage("what was left", math.inf, ())
        for stage, until in zip((*stages, last), (*shares, math.inf)):
            waiting = later if stage is last else deque(stage.cases)
            until, at_once = min(until, end), stage.at_once
            while (waiting and time.monotonic() < until) or pool.count(beside=False):
                if time.monotonic() >= end:
                    break
                while waiting and pool.count(beside=False) < at_once and time.monotonic() < until:
                    pool.start(waiting.popleft())
                while beside and background and pool.count(beside=True) < background.at_once:
                    pool.start(beside.popleft(), beside=True)
                pool.wait()
            if waiting is not later:
                later.extend(waiting)
    finally:
        results.left_out += [f"{case.stage}: {case.name}" for case in (*pool.stop(), *later, *beside)]


class _Process(NamedTuple):
    case: Case
    process: Any
    output: Path
    until: float
    beside: bool


class _Pool:
    """The running processes, by the end of the pipe that their rows come out of."""

    def __init__(self, context: Any, results: Results, end: float) -> None:
        self.context, self.results, self.end = context, results, end
        self.running: dict[Any, _Process] = {}

    def count(self, beside: bool) -> int:
        return sum(each.beside == beside for each in self.running.values())

    def start(self, case: Case, beside: bool = False) -> None:
        ours, theirs = self.context.Pipe(duplex=False)
        number, name = tempfile.mkstemp()
        os.close(number)
        process = self.context.Process(target=serve, args=(case, theirs, name, beside), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is noticed here
        self.running[ours] = _Process(case, process, Path(name), time.monotonic() + case.limit, beside)

    def wait(self) -> None:
        """Take in what has come, and end what has run too long."""
        until = min((each.until for each in self.running.values()), default=0.0)
        pause = max(0.0, min(until, self.end) - time.monotonic())
        ready: list[Any] = connection.wait(list(self.running), timeout=min(pause, 1.0))
        for pipe in ready:
            case = self.running[pipe].case
            try:
                row = pipe.recv()
            except (EOFError, OSError):
                self._ended(pipe)
                continue
            if row is None:
                self._ended(pipe, finished=True)
            else:
                self.results.add(case, row)
        for pipe, each in list(self.running.items()):
            if time.monotonic() > each.until:
                self._ended(pipe, reason=f"took longer than {each.case.limit:g} s")

    def _ended(self, pipe: Any, finished: bool = False, reason: str = "") -> None:
        case, process, output, _, _ = self.running.pop(pipe)
        if not finished and not reason:
            process.join(5)
            reason = f"its process ended with {process.exitcode}"
        _kill(process)
        pipe.close()
        said = output.read_text(encoding="utf-8", errors="replace")[-KEPT_OUTPUT:]
        output.unlink()
        if reason:
            self.results.add(case, {"failed": reason, "output": said})

    def stop(self) -> list[Case]:
        """End everything, and return what was running."""
        stopped = [each.case for each in self.running.values()]
        for each in self.running.values():
            _kill(each.process, wait=0)
        for pipe in list(self.running):
            self._ended(pipe, finished=True)
        return stopped


def _kill(process: Any, wait: float = 0.1) -> None:
    """End a process and those that it started. One that a hanging device holds is not waited for."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(wait)


def serve(case: Case, pipe: Any, output: str, beside: bool) -> None:
    """What a process does."""
    os.setsid()
    if beside:
        os.nice(10)
    with open(output, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        for row in case.function(**case.arguments):
            pipe.send(row)
    except Exception as error:
        said = (str(error).strip() or "no message").splitlines()
        pipe.send({"failed": f"{type(error).__name__}: {said[0][:300]}", "output": "\n".join(said)[-KEPT_OUTPUT:]})
    pipe.send(None)
    pipe.close()
    os._exit(0)  # the CUDA context goes with the process, sooner than by its own end
