"""Trials: many runs, each in its own folder, one after the other or in parallel; finished ones are not run again."""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import recipes
from ...blocks.language_model import LanguageModel
from ...recipes import Recipe, StorageError
from ...registry import RecipeError
from ..data import Source, open_source
from ..signals import Terminated, handling, leave
from ..terminal import CommandFailed
from .distributed import Processes
from .log import LOG, Event, parse_event, read_log
from .run_folder import (
    RECIPE,
    TRAIN,
    check_data_order,
    check_same_data,
    data_of_run,
    is_run,
    read_inputs,
    read_run,
    write_file,
    write_inputs,
)
from .settings import Settings
from .train import check_run, train
from .train_step import TrainStep
from .validation import validate

RESULT = "result.json"
SAVED = "interrupted; progress is saved: run the same command to resume"
TEST_BATCHES = 4
"""Batches of the final test, as a multiple of those of a validation."""

Result = dict[str, Any]
Listener = Callable[[str, Event], None]
"""Called with the label of a trial and each of its events, from any thread."""


class Trial(NamedTuple):
    """A run to be done. ``label``: its name in messages."""

    label: str
    recipe: Recipe
    data: Any
    settings: Settings
    folder: Path


def check_trial(trial: Trial) -> None:
    """Raise ``RecipeError`` if the run could not begin, and ``StorageError`` if its folder has a different run."""
    try:
        source = check_run(trial.recipe, trial.data, trial.settings)
    except RecipeError as error:
        raise RecipeError(error.problems, f"{trial.label}: {error.source}") from None
    if not is_run(trial.folder):
        return
    recipe, data, settings = read_inputs(trial.folder, imports=trial.recipe.imports)
    wanted = trial.settings.to_dict()
    differences = [
        *(["the recipe"] if recipe.fingerprint != trial.recipe.fingerprint else []),
        *([f"data: {data}"] if data != trial.data else []),
        *(f"{key} = {value}" for key, value in settings.to_dict().items() if value != wanted[key] and key != "device"),
    ]
    if differences:
        found = ", ".join(differences)
        raise StorageError(f"{trial.folder}: this folder has a different run ({found}): choose another --out")
    check_same_data(trial.folder, read_run(trial.folder).get("data"), source.describe())


def run_trials(trials: Sequence[Trial], *, jobs: int = 1, told: Listener | None = None) -> Iterator[Result]:
    """Run the unfinished ones of ``trials``, which ``check_trial`` has accepted, and yield all results in order.

    A result has ``steps``, ``tokens``, ``tokens_per_second``, ``seconds``, ``parameters``, ``curve`` (the validations:
    ``step``, ``tokens``, ``loss``, ...), ``valid`` (the last of them), ``test`` (the same metrics on the test split)
    and ``frozen`` (those with the memories frozen, if the model has some); or only ``failed``, the reason. With several
    ``jobs`` each trial is a process, and they share the cores.
    """
    notify = told if told is not None else lambda label, event: None
    if not all(map(_finished, trials)):
        for trial in trials:  # finished ones, too: all of them are compared on the same rows
            if is_run(trial.folder):
                check_data_order(trial.folder)
    try:
        if jobs == 1:
            for trial in trials:
                yield _finished(trial) or _collect(trial, _train_here(trial, notify), notify)
            return
        with Workers(jobs, notify) as workers:
            started = [None if _finished(trial) else workers.start(trial) for trial in trials]
            for trial, future in zip(trials, started):
                yield _finished(trial) or _collect(trial, future.result() if future is not None else None, notify)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(SAVED) from None
    except Terminated as ended:
        raise Terminated(ended.number, SAVED) from None


def _finished(trial: Trial) -> Result | None:
    try:
        result: Result = json.loads((trial.folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result


def _train_here(trial: Trial, notify: Listener) -> str | None:
    """Train in this process. Returns the error, or ``None``."""
    on_event = functools.partial(notify, trial.label)
    try:
        train(trial.recipe, trial.data, trial.settings, trial.folder, resume=True, on_event=on_event)
    except CommandFailed as error:
        return str(error)
    return None


def _collect(trial: Trial, error: str | None, notify: Listener) -> Result:
    """The result of a trial that has been trained, which is saved with the run.

    Raises ``CommandFailed`` if an ``error`` other than a bad step ended the training.
    """
    if error is None:
        result = _measure(trial)
    else:
        last = read_log(trial.folder / LOG)[-1:]
        if not last or last[0]["event"] != "stop" or last[0]["message"].startswith("interrupted"):
            raise CommandFailed(f"{trial.label}: {error}")
        result = {"failed": last[0]["message"]}
    write_file(trial.folder / RESULT, json.dumps(result, indent=1) + "\n")
    notify(trial.label, {"event": "result", **result})
    return result


def _measure(trial: Trial) -> Result:
    """Test a trained model."""
    settings = trial.settings
    model = recipes.load(trial.folder / "model", device=settings.device, dtype=settings.dtype)
    source = open_source(
        data_of_run(trial.folder, trial.data),
        rows=settings.batch,
        length=settings.length,
        split="test",
        seed=settings.seed,
        vocab=model.vocab,
    )
    step = TrainStep(model, settings, Processes(device=torch.device(settings.device)))
    batches = TEST_BATCHES * settings.valid_batches
    test = validate(step, source, batches)
    frozen = _test_frozen(model, step, source, batches)
    events = read_log(trial.folder / LOG)
    tokens_per_step = settings.batch * source.length * settings.windows
    curve = []
    for event in events:
        if event["event"] == "valid":
            metrics = {key: value for key, value in event.items() if key not in ("event", "step") and value is not None}
            curve.append({"step": event["step"], "tokens": event["step"] * tokens_per_step, **metrics})
    for name, metrics in (("validation", curve[-1] if curve else {}), ("test", test)):
        if metrics and not _all_finite(metrics):
            return {"failed": f"the {name} loss is not finite"}
    speeds = [event["tokens_per_second"] for event in events if event["event"] == "step"]
    speed = statistics.median(speeds) if speeds else None
    tokens = settings.steps * tokens_per_step
    return {
        "steps": settings.steps,
        "tokens": tokens,
        "tokens_per_second": speed,
        "seconds": None if not speed else tokens / speed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "curve": curve,
        "valid": curve[-1] if curve else None,
        "test": test,
        "frozen": frozen,
    }


def _test_frozen(model: LanguageModel, step: TrainStep, source: Source, batches: int) -> dict[str, float] | None:
    """Metrics with the memories frozen; ``None`` if there is no memory or the metrics are not finite."""
    try:
        memories = model.freeze_memory()
    except ValueError:  # a memory that is only written
        return None
    with memories:
        metrics = validate(step, source, batches) if memories.names else None
    return metrics if metrics is not None and _all_finite(metrics) else None


def _all_finite(metrics: dict[str, Any]) -> bool:
    return metrics.get("loss") is not None and all(math.isfinite(number) for number in metrics.values())


class Workers:
    """Runs trials in processes, ``jobs`` at a time: ``with Workers(2, told) as workers: workers.start(trial)``.

    If the block is left early, the running processes are terminated, and save a checkpoint as after Ctrl-C.
    """

    def __init__(self, jobs: int, told: Listener) -> None:
        self._told = told
        self._pool = ThreadPoolExecutor(jobs)
        self._running: set[subprocess.Popen[str]] = set()
        self._leaving, self._lock = False, threading.Lock()
        self._environment = {**os.environ, "OMP_NUM_THREADS": str(threads_per_job(jobs))}
        # as Ctrl-C: otherwise the workers would die at their next print, and save nothing
        self._handling = handling(leave)

    def __enter__(self) -> Workers:
        self._handling.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._leaving = True
            for process in self._running:
                process.terminate()
        self._pool.shutdown(cancel_futures=True)
        self._handling.__exit__(None, None, None)

    def start(self, trial: Trial) -> Future[str | None]:
        """Train a trial as soon as a job is free. The future's result is the error, or ``None``."""
        return self._pool.submit(self._run, trial)

    def _run(self, trial: Trial) -> str | None:
        if not is_run(trial.folder):
            write_inputs(trial.folder, trial.recipe, trial.data, trial.settings)
        # with the path of this process: ``-m`` would put the current folder first, and run what is there
        code = f"import sys; sys.path[:] = {sys.path!a}; from titans_build.tools.train import run; run()"
        command = [sys.executable, "-c", code, str(trial.folder / RECIPE)]
        command += ["--train", str(trial.folder / TRAIN), "--out", str(trial.folder), "--resume", "--json"]
        command += ["--allow-imports"] * bool(trial.recipe.imports)
        with self._lock:
            if self._leaving:
                return "interrupted"
            # in a session of its own: Ctrl-C at the terminal must not reach it besides our signal
            process = subprocess.Popen(
                command,
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            self._running.add(process)
        error, rest = "", ""
        with process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    event = parse_event(line)
                    if event is None:
                        rest = (rest + line)[-2000:]
                    elif "error" in event:
                        error = event["error"]["message"]
                    elif "event" in event:
                        self._told(trial.label, event)
            except BaseException:  # the process would block once nobody reads its output
                process.terminate()
                raise
        with self._lock:
            self._running.discard(process)
        if not process.returncode:
            return None
        return error or rest.strip() or f"its process ended with status {process.returncode}"


def threads_per_job(jobs: int) -> int:
    """Threads of each process when ``jobs`` processes share the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // jobs)
