"""Worker processes of the GPU check: each compiles kernels on a core of its own and runs one task at a time.

A worker that a kernel has ended, whose CUDA context a kernel has corrupted, or that hangs is replaced, and its task
gets an outcome like any other.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
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
        yield from (parity.outcome(task, device) for task in tasks)
        return
    for task, outcome, failure in _run_all(check, [(task, str(device)) for task in tasks], processes):
        yield outcome or parity.no_outcome(task[0], failed=failure)


def warm(device: torch.device, dtype: torch.dtype, processes: int) -> Iterator[str]:
    """Compile the kernels to be timed, which this process then finds in the compiler's cache.

    Yields the error, or an empty string, for each of ``speed.warmups``.
    """
    tasks = [(number, str(device), dtype) for number in range(len(speed.warmups(device, dtype)))]
    for _, _, failure in _run_all(compile_kernel, tasks, processes):
        yield failure


def deterministic() -> None:
    """Deterministic algorithms also fill ``torch.empty`` with NaN, which shows what a kernel does not write."""
    torch.use_deterministic_algorithms(True, warn_only=True)


# -- what a worker runs: a function returns its result, and why it failed or an empty string ---------------------------


def check(task: Task, device: str) -> tuple[Outcome, str]:
    deterministic()
    outcome = parity.outcome(task, torch.device(device))
    return outcome, outcome.failed


def compile_kernel(number: int, device: str, dtype: torch.dtype) -> tuple[None, str]:
    return None, speed.warmups(torch.device(device), dtype)[number]()


# -- the processes -----------------------------------------------------------------------------------------------------


def _run_all(
    function: Callable[..., tuple[Any, str]], tasks: Sequence[Any], processes: int
) -> Iterator[tuple[Any, Any, str]]:
    """The arguments of each call of ``function`` with what it returned, as they finish."""
    workers: list[_Worker] = []
    own = threading.local()

    def run(arguments: tuple[Any, ...]) -> tuple[Any, str]:
        if not hasattr(own, "worker"):
            own.worker = _Worker()
            workers.append(own.worker)
        answer: tuple[Any, str] = own.worker.run(function, arguments)
        return answer

    pool = ThreadPoolExecutor(processes)
    try:
        futures = {pool.submit(run, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], *future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:  # it may still be running a task
            worker.stop()


class _Worker:
    """A process that runs one function at a time, and is started again after it has ended."""

    process: multiprocessing.process.BaseProcess | None = None

    def run(self, function: Callable[..., tuple[Any, str]], arguments: tuple[Any, ...]) -> tuple[Any, str]:
        """What ``function`` returns in the process; ``None`` and the reason if the process ends."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, theirs = context.Pipe()
            self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()  # so that the end of the process is noticed here
        try:
            self.pipe.send((function, arguments))
            if self.pipe.poll(TIMEOUT):
                result, failure = self.pipe.recv()
                if any(word in failure for word in CORRUPTED):
                    self.stop()
                return result, failure
        except (EOFError, OSError):  # the process has ended
            pass
        return None, f"its process ended with {self.stop()} after at most {TIMEOUT:.0f} s"

    def stop(self) -> int | None:
        """End the process and return its exit code."""
        process, self.process = self.process, None
        if process is None:
            return None
        process.kill()
        process.join()
        return process.exitcode


def _serve(pipe: Connection) -> None:
    """Run functions until the other end of ``pipe`` is closed. Compilers may print; nothing of it is shown."""
    torch.set_num_threads(1)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*arguments))
