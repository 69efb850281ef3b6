"""Worker processes of the GPU check: each compiles kernels on a core of its own and runs one task at a time.

A worker reads a task as a line of JSON from standard input and answers with a line of JSON. A worker whose CUDA context
a kernel has corrupted, or that hangs, is replaced, and its task gets an outcome like any other.

``python -m titans_build.tools.gpu.workers DEVICE DTYPE`` is such a process.
"""

from __future__ import annotations

import json
import math
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import parity, speed
from .parity import Outcome, Task

TIMEOUT = 180.0
"""Seconds for one task, compiling included."""
CORRUPTED = ("CUDA error", "AcceleratorError", "device-side assert", "illegal memory access")


def outcomes(tasks: Sequence[Task], device: torch.device, processes: int) -> Iterator[Outcome]:
    """The outcome of every task, as they finish. ``processes``: 0 runs them in this process."""
    if not processes:
        deterministic()
        for task in tasks:
            yield parity.outcome(task, device)
        return
    for number, answer in _answers([["parity", *task] for task in tasks], [str(device), "float32"], processes):
        task = tasks[number]
        if isinstance(answer, str):
            most = parity.TOLERANCE[task.precision]
            yield Outcome(task.operation, task.backend, task.case, task.precision, math.nan, most, failed=answer)
        else:
            yield Outcome(**answer)


def warm(device: torch.device, dtype: str, processes: int) -> Iterator[str]:
    """Compile the kernels to be timed, which this process then finds in the compiler's cache.

    Yields the error, or an empty string, for each of ``speed.warmups``.
    """
    count = len(speed.warmups(device, getattr(torch, dtype)))
    if processes:
        for _, answer in _answers([["warm", n] for n in range(count)], [str(device), dtype], processes):
            yield answer if isinstance(answer, str) else ""


def deterministic() -> None:
    """Deterministic algorithms also fill ``torch.empty`` with NaN, which shows what a kernel does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def _answers(
    questions: Sequence[Sequence[object]], words: Sequence[str], processes: int
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number of each question with its answer, or with the reason why its process ended."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(questions)):
        waiting.put(number)
    given: queue.SimpleQueue[tuple[int, dict[str, Any] | str]] = queue.SimpleQueue()
    stop = threading.Event()
    children: list[subprocess.Popen[str]] = []

    def work() -> None:
        child: subprocess.Popen[str] | None = None
        while not stop.is_set():
            try:
                number = waiting.get_nowait()
            except queue.Empty:
                break
            if child is None:
                child = subprocess.Popen(
                    [sys.executable, "-m", __name__, *words],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                )  # fmt: skip
                children.append(child)
            assert child.stdin is not None and child.stdout is not None
            timer = threading.Timer(TIMEOUT, child.kill)
            timer.start()
            try:
                child.stdin.write(json.dumps(questions[number]) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
            except OSError:  # the process has ended
                line = ""
            timer.cancel()
            if line:
                given.put((number, json.loads(line)))
            if not line or child.poll() is not None:
                code = child.wait()
                child = None
                if not line:
                    given.put((number, f"its process ended with {code} after at most {TIMEOUT:.0f} s"))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(processes, len(questions)))]
    for thread in threads:
        thread.start()
    try:
        for _ in questions:
            yield given.get()
    finally:
        stop.set()
        for thread in threads:
            for child in children:  # it may still be running a task
                child.kill()
            thread.join()
        for child in children:
            child.kill()
            child.wait()


def main(words: Sequence[str]) -> None:
    """A worker: answer the questions on standard input."""
    device, dtype = torch.device(words[0]), getattr(torch, words[1])
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # a library may print, too
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        if kind == "parity":
            deterministic()
            result = parity.outcome(Task(*arguments), device)
            answer, error = result._asdict(), result.failed
        else:
            torch.use_deterministic_algorithms(False)
            error = speed.warmups(device, dtype)[arguments[0]]()
            answer = {"failed": error}
        print(json.dumps(answer), file=answers, flush=True)
        if any(word in error for word in CORRUPTED):
            break


if __name__ == "__main__":
    main(sys.argv[1:])
