"""Many runs, each in a folder of its own: one after the other or side by side, and none twice."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from ... import recipes
from ...blocks.language_model import LanguageModel
from ...recipes import StorageError
from ...recipes.replacing import replacing
from ...registry import RecipeError
from ..data import Source, open_source
from ..terminal import CommandFailed
from .beforehand import check_run
from .distributed import Processes
from .folder import described, expect_the_same_data, is_run, recorded, writing
from .journal import LOG, Event, read_log
from .measuring import validate
from .running import train
from .side_by_side import Ended, SideBySide, Told, Trial
from .stepping import Reader

RESULT = "result.json"
TESTED = 4
"""Times as many batches as a validation has: what is said in the end may take longer to be known."""


def run_trials(trials: Sequence[Trial], *, jobs: int = 1, told: Told | None = None) -> Iterator[dict[str, Any]]:
    """Run what has not been run of ``trials`` that ``check_trial`` has let pass, and yield every result, in order.

    A result: ``steps``, ``tokens``, ``tokens_per_second``, ``seconds``, ``parameters``, ``curve`` (validations:
    ``step``, ``tokens``, ``loss``, ...), ``valid`` (the last of them), ``test`` (as many numbers on rows that nothing
    was chosen by) and ``frozen`` (the same with the memories frozen, where there are some); or ``failed``: why it came
    to nothing. With several ``jobs`` each trial is a process, and they share the cores.
    """
    tell = told if told is not None else lambda label, event: None
    try:
        yield from _run(trials, jobs, tell)
    except KeyboardInterrupt:
        said = "interrupted; what has been done is kept: the same command goes on from there"
        raise KeyboardInterrupt(said) from None


def _run(trials: Sequence[Trial], jobs: int, tell: Told) -> Iterator[dict[str, Any]]:
    if jobs == 1:
        for trial in trials:
            yield _done(trial) or _here(trial, tell)
        return
    with SideBySide(jobs, tell) as processes:
        started = [None if _done(trial) else processes.start(trial) for trial in trials]
        for trial, process in zip(trials, started):
            yield _done(trial) or _after(trial, process, tell)


def check_trial(trial: Trial) -> None:
    """Raise ``RecipeError`` where a run could not be, and ``StorageError`` where another one is in its folder."""
    try:
        source = check_run(trial.recipe, trial.data, trial.settings)
    except RecipeError as error:
        raise RecipeError(error.problems, f"{trial.label}: {error.source}") from None
    if not is_run(trial.folder):
        return
    recipe, data, settings = recorded(trial.folder, allow_imports=trial.allow_imports)
    differs = [
        *(["the recipe"] if recipe.fingerprint != trial.recipe.fingerprint else []),
        *([f"data: {data}"] if data != trial.data else []),
        *(
            f"{key} = {value}"
            for key, value in settings.to_dict().items()
            if value != trial.settings.to_dict()[key] and key != "device"
        ),
    ]
    if differs:
        raise StorageError(
            f"{trial.folder}: there is another run in this folder ({', '.join(differs)}): choose another --out"
        )
    expect_the_same_data(trial.folder, described(trial.folder).get("data"), source.describe())


def _done(trial: Trial) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((trial.folder / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


def _here(trial: Trial, tell: Told) -> dict[str, Any]:
    """Run it in this process."""
    try:
        train(
            trial.recipe,
            trial.data,
            trial.settings,
            trial.folder,
            resume=True,
            on_event=lambda event: tell(trial.label, event),
        )
    except CommandFailed:
        if (found := _stopped(trial, tell)) is None:
            raise
        return found
    return finish(trial, tell)


def _after(trial: Trial, process: Future[Ended] | None, tell: Told) -> dict[str, Any]:
    """The result of what ran in a process of its own."""
    status, error = process.result() if process is not None else Ended(0, "")
    if status == 0:
        return finish(trial, tell)
    if (found := _stopped(trial, tell)) is not None:
        return found
    raise CommandFailed(f"{trial.label}: {error or f'its process ended with status {status}'}")


def _stopped(trial: Trial, tell: Told) -> dict[str, Any] | None:
    """The result of a run that came to nothing by itself: no full disk, and nobody's Ctrl-C."""
    last = read_log(trial.folder / LOG)[-1:]
    if not last or last[0]["event"] != "stop" or last[0]["message"] == "interrupted":
        return None
    return _keep(trial, {"failed": last[0]["message"]}, tell)


def finish(trial: Trial, tell: Told) -> dict[str, Any]:
    """Measure what has been trained, and keep the result with the run."""
    settings = trial.settings
    model = recipes.load(trial.folder / "model", device=settings.device, dtype=settings.dtype)
    source = open_source(
        trial.data, rows=settings.batch, length=settings.length, split="test", seed=settings.seed, vocab=model.vocab
    )
    reader = Reader(model, settings, Processes(device=torch.device(settings.device)))
    batches = TESTED * settings.valid_batches
    test = validate(reader, source, batches)
    frozen = _frozen(model, reader, source, batches)
    events = read_log(trial.folder / LOG)
    speeds = [event["tokens_per_second"] for event in events if event["event"] == "step"]
    per_step = settings.batch * source.length * settings.windows
    curve = [
        {"step": event["step"], "tokens": event["step"] * per_step, **_numbers(event)}
        for event in events
        if event["event"] == "valid"
    ]
    for name, numbers in (("validation", curve[-1] if curve else {}), ("test", test)):
        if numbers and not _finite(numbers):
            return _keep(trial, {"failed": f"its {name} loss is no number"}, tell)
    speed = statistics.median(speeds) if speeds else None
    tokens = settings.steps * per_step
    found = {
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
    return _keep(trial, found, tell)


def _frozen(model: LanguageModel, reader: Reader, source: Source, batches: int) -> dict[str, float] | None:
    """What is left when the memories learn nothing; ``None`` where there is no memory, or it comes to no number."""
    try:
        memories = model.freeze_memory()
    except ValueError:  # one that is only written
        return None
    with memories:
        found = validate(reader, source, batches) if memories.names else None
    return found if found is not None and _finite(found) else None


def _finite(numbers: dict[str, Any]) -> bool:
    return numbers.get("loss") is not None and all(math.isfinite(number) for number in numbers.values())


def _keep(trial: Trial, found: dict[str, Any], tell: Told) -> dict[str, Any]:
    with writing(trial.folder / RESULT), replacing(trial.folder / RESULT) as path:
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tell(trial.label, {"event": "result", **found})
    return found


def _numbers(event: Event) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("event", "step") and value is not None}
