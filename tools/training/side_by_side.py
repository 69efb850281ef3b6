"""Runs in processes of their own, a few at a time, with the cores shared out among them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ...recipes import Recipe, StorageError
from ...recipes.reading import write_yaml
from ...recipes.replacing import replacing
from .folder import RECIPE, TRAIN, is_run
from .journal import Event
from .settings import Settings


class Trial(NamedTuple):
    """A run that is wanted."""

    label: str
    """What it is called in messages."""
    recipe: Recipe
    data: Any
    settings: Settings
    folder: Path
    allow_imports: bool = False


Told = Callable[[str, Event], None]
"""Told the label of a trial and what happens in it. May be called from any thread."""


class Ended(NamedTuple):
    """How a process ended."""

    status: int
    error: str


class SideBySide:
    """``with SideBySide(2, told) as processes: processes.start(trial).result()``.

    Where the block is left early, what still runs is told to stop, and saves itself as after Ctrl-C.
    """

    def __init__(self, jobs: int, told: Told) -> None:
        self._told = told
        self._pool = ThreadPoolExecutor(jobs)
        self._running: set[subprocess.Popen[str]] = set()
        self._leaving, self._lock = False, threading.Lock()
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads_of_each(jobs))}
        self._before: Any = None

    def __enter__(self) -> SideBySide:
        if threading.current_thread() is threading.main_thread():
            # as Ctrl-C: the processes would hear of it when they next print, and would not save themselves
            self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._leaving = True
            for process in self._running:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._before or signal.SIG_DFL)

    def start(self, trial: Trial) -> Future[Ended]:
        """Begin or go on with a run, once one of the places is free."""
        return self._pool.submit(self._run, trial)

    def _run(self, trial: Trial) -> Ended:
        if self._leaving:
            return Ended(130, "interrupted")
        if not is_run(trial.folder):
            _prepare(trial)
        words = ["--out", str(trial.folder), "--resume", "--json", *(["--allow-imports"] * trial.allow_imports)]
        command = [sys.executable, "-m", "titans_build.tools.train", str(trial.folder / RECIPE), *words]
        command += ["--train", str(trial.folder / TRAIN)]
        # Ctrl-C at a terminal would reach every process there: each shall be told once, by us
        process = subprocess.Popen(
            command,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        with self._lock:
            self._running.add(process)
            if self._leaving:
                process.terminate()
        error = ""
        with process, ThreadPoolExecutor(1) as reader:
            assert process.stdout is not None and process.stderr is not None
            said = reader.submit(process.stderr.read)
            try:
                for line in process.stdout:
                    event = _parsed(line)
                    if "error" in event:
                        error = event["error"]["message"]
                    elif "event" in event:
                        self._told(trial.label, event)
            except BaseException:  # nobody listens any more, and it would wait for someone who does
                process.terminate()
                raise
            error = error or said.result().strip()[-2000:]
        with self._lock:
            self._running.discard(process)
        return Ended(process.returncode, error)


def threads_of_each(jobs: int) -> int:
    """Threads that each of so many processes computes with: the cores are shared out."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)


def _parsed(line: str) -> Event:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _prepare(trial: Trial) -> None:
    """What the process is to read, where its own record of it will be."""
    texts = {RECIPE: trial.recipe.to_yaml(), TRAIN: write_yaml({"data": trial.data, **trial.settings.to_dict()})}
    try:
        trial.folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replacing(trial.folder / name) as path:
                path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{trial.folder}: cannot be written: {error.strerror or error}") from error
