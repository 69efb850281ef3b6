"""Processes that share out what a GPU check has to do: each compiles kernels on a core of its own.

A process is asked line by line, and answers with a line of JSON. One whose GPU context a kernel has spoiled, or that
hangs, is replaced, and what it was at is an outcome like any other.

``python -m titans_build.tools.gpu.apart DEVICE DTYPE`` is such a process; it reads from standard input.
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

PATIENCE = 180.0
"""Seconds for one task, compiling included."""
SPOILED = ("CUDA error", "AcceleratorError", "device-side assert", "illegal memory access")


def outcomes(tasks: Sequence[Task], device: torch.device, processes: int) -> Iterator[Outcome]:
    """Of every task, as they come: in this process where ``processes`` is 0."""
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
    """Have the kernels of what will be timed compiled, which its process then finds in the compiler's cache.

    Yields what could not be, or nothing, for each of ``speed.warming``.
    """
    count = len(speed.warming(device, getattr(torch, dtype)))
    if processes:
        for _, answer in _answers([["warm", n] for n in range(count)], [str(device), dtype], processes):
            yield answer if isinstance(answer, str) else ""


def deterministic() -> None:
    """And with it, ``torch.empty`` is filled with NaN: what a kernel leaves unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def _answers(
    questions: Sequence[Sequence[object]], words: Sequence[str], processes: int
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """The number of each question, and its answer, or what ended the process that was asked."""
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
            patience = threading.Timer(PATIENCE, child.kill)
            patience.start()
            try:
                child.stdin.write(json.dumps(questions[number]) + "\n")
                child.stdin.flush()
                line = child.stdout.readline()
            except OSError:  # it is gone
                line = ""
            patience.cancel()
            if line:
                given.put((number, json.loads(line)))
            if not line or child.poll() is not None:
                code = child.wait()
                child = None
                if not line:
                    given.put((number, f"its process ended with {code} after at most {PATIENCE:.0f} s"))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(processes, len(questions)))]
    for thread in threads:
        thread.start()
    try:
        for _ in questions:
            yield given.get()
    finally:
        stop.set()
        for thread in threads:
            for child in children:  # one may be at a task that nobody waits for any more
                child.kill()
            thread.join()
        for child in children:
            child.kill()
            child.wait()


def main(words: Sequence[str]) -> None:
    """Answer until there is nothing more to answer."""
    device, dtype = torch.device(words[0]), getattr(torch, words[1])
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for line in sys.stdin:
        kind, *asked = json.loads(line)
        if kind == "parity":
            deterministic()
            said = parity.outcome(Task(*asked), device)
            answer, trouble = said._asdict(), said.failed
        else:
            torch.use_deterministic_algorithms(False)
            trouble = speed.warming(device, dtype)[asked[0]]()
            answer = {"failed": trouble}
        print(json.dumps(answer), file=answers, flush=True)
        if any(word in trouble for word in SPOILED):
            break


if __name__ == "__main__":
    main(sys.argv[1:])
