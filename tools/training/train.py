"""``train``: a run from its beginning, or from its last checkpoint, to its end."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import recipes
from ...blocks.language_model import LanguageModel
from ...recipes import Recipe, StorageError, load_recipe
from ...recipes.loading import Source as RecipeSource
from ...registry import Problem, RecipeError, show
from ..randomness import ORDER
from .checkpoint import CheckpointManager, verify
from .distributed import Processes, gather_parameters, init_processes
from .log import Event, EventLog
from .optimizer import unmatched_patterns
from .preflight import check_model, find_device, open_sources
from .run_folder import (
    check_data_order,
    check_same_data,
    is_run,
    locked,
    read_inputs,
    read_run,
    setting_changes,
    write_run,
)
from .settings import Settings, as_settings
from .train_step import activation_checkpointing
from .trainer import Interrupt, Trainer


class TrainedRun(NamedTuple):
    """The result of ``train``. With several processes only the first has a model and a history."""

    model: LanguageModel | None
    """As saved in ``out/model``: with the averaged weights if the settings have ``ema``."""
    history: list[Event]
    """Every logged event, from the beginning of the run."""
    best: dict[str, float] | None
    """The best validation: ``step``, ``loss``, ``accuracy``, ..."""
    out: Path


def train(
    recipe: RecipeSource | None,
    data: str | Mapping[str, Any] | None,
    settings: Settings | Mapping[str, Any] | str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    on_event: Callable[[Event], None] | None = None,
    resume: bool = False,
    weights: str | os.PathLike[str] | None = None,
) -> TrainedRun:
    """Train a model of ``recipe`` on ``data`` in the folder ``out``.

    Args:
        recipe: what ``load_recipe`` takes.
        data: what ``open_source`` takes.
        settings: a mapping, a YAML file, or ``None`` for the defaults; see ``Settings``.
        on_event: called with every event; see ``EventLog``.
        resume: continue the run in ``out`` if there is one. Recipe and data may then be ``None``, and settings need
            only contain what changes.
        weights: the folder of a saved model of the same recipe, to start from.

    The folder gets recipe.yaml, train.yaml, run.json, log.jsonl, tensorboard/, checkpoints/ and at the end model/.
    Under ``torchrun`` the processes share the work. Ctrl-C saves a checkpoint and raises ``KeyboardInterrupt``; a
    second one ends the process.

    Raises ``RecipeError`` for invalid recipes, data and settings, ``StorageError`` for a folder that cannot be used,
    and ``CommandFailed`` if training fails: a nonfinite loss, a full disk.
    """
    folder = Path(out)
    resuming = resume and is_run(folder)
    changes: dict[str, Any] = {}
    run: dict[str, Any] = {}
    if resuming:
        run = read_run(folder)
        recipe, data, settings, changes = _resumed_inputs(folder, recipe, data, settings)
    elif is_run(folder):
        raise StorageError(f"{folder}: this folder has a run; resume it (--resume), or choose another folder")
    elif recipe is None or data is None:
        raise StorageError(f"{folder}: this folder has no run to resume; give a recipe and data to start one")
    settings = as_settings(settings)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    device = find_device(settings.device)
    devices: list[int] | None = [] if device.type == "cpu" else None
    processes = init_processes(device)
    with torch.random.fork_rng(devices), contextlib.ExitStack() as stack:
        source, valid = open_sources(recipe, data, settings, processes)
        check_same_data(folder, run.get("data"), source.describe())
        if processes.main:
            stack.enter_context(locked(folder))
        checkpoints = CheckpointManager(folder / "checkpoints")
        done = max(checkpoints.steps(), default=0) if resuming else 0
        if settings.steps < done:
            message = f"expected at least the {done:,} steps that the run has done, got {settings.steps:,}"
            raise RecipeError([Problem("steps", message)], "settings")
        if resuming:
            weights = run.get("weights")
        elif weights is not None:
            weights = os.path.abspath(weights)
        model = _build(recipe, settings, processes, None if done else weights)
        check_model(model, source, settings)
        torch.manual_seed(settings.seed + processes.rank)
        log = EventLog(folder if processes.main else None, on_event, tensorboard=settings.tensorboard)
        stack.callback(log.close)
        if settings.recompute:
            stack.enter_context(activation_checkpointing(model))
        command = _resume_command(folder, processes)
        trainer = Trainer(model, source, valid, settings, processes, log, checkpoints, command)
        warnings = unmatched_patterns(model, settings.no_decay)
        found = checkpoints.latest(warnings.append) if resuming and processes.main else None
        if resuming and processes.main and (found is None or found[0] < settings.steps):
            check_data_order(folder)
        if processes.main:
            if not resuming or changes:
                write_run(
                    folder,
                    recipe,
                    data,
                    settings,
                    source.describe(),
                    data_order=run.get("data_order") if resuming else ORDER,
                    weights=weights,
                    processes=processes.world,
                )
            checkpoints.remove_temporary()
        _begin(trainer, found, warnings, changes)
        with stack.enter_context(Interrupt()) as interrupt:
            trainer.run(interrupt)
        return _finish(trainer, folder, recipe)


def _resumed_inputs(
    folder: Path, recipe: RecipeSource | None, data: Any, settings: Any
) -> tuple[Recipe, Any, Settings, dict[str, Any]]:
    """The recipe, data and settings of the run in a folder, and the settings that change."""
    known, known_data, before = read_inputs(folder, allow_imports=isinstance(recipe, Recipe))
    if recipe is not None:
        given = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        if given.fingerprint != known.fingerprint:
            whose = "another recipe" if known.name is None else show(known.name)
            message = f"the run is of {whose} ({known.fingerprint}), not of this one ({given.fingerprint})"
            raise RecipeError([Problem("", message)], given.name or "recipe")
    if data is not None and data != known_data:
        message = f"the run reads {show(known_data)} and cannot be resumed with {show(data)}"
        raise RecipeError([Problem("", message)], "data")
    if isinstance(settings, Mapping):
        settings = {**before.to_dict(), **settings}
    after = before if settings is None else as_settings(settings)
    return known, known_data, after, setting_changes(folder, before, after)


def _build(recipe: Recipe, settings: Settings, processes: Processes, weights: Any) -> LanguageModel:
    if weights is None:
        return recipes.build(recipe, device=processes.device, dtype=settings.dtype, seed=settings.seed)
    model = recipes.load(weights, device=processes.device, dtype=settings.dtype, overrides=recipe.overrides)
    if model.recipe.fingerprint != recipe.fingerprint:  # type: ignore[union-attr]
        raise StorageError(f"{weights}: the saved model is of another recipe than {show(recipe.name or 'this one')}")
    return model


def _begin(
    trainer: Trainer, checkpoint: tuple[int, dict[str, Any]] | None, warnings: list[str], changes: dict[str, Any]
) -> None:
    """Load the checkpoint, which the first process has found, and log the start."""
    step = int(trainer.processes.sum(checkpoint[0] if checkpoint else 0)[0])
    if step:
        trainer.load(step, checkpoint[1] if checkpoint else verify(trainer.checkpoints.path(step)))
    log = trainer.log
    log.open(step)
    for warning in warnings:
        log.emit("warning", step=step, message=warning)
    log.emit("start", step=step, steps=trainer.settings.steps, **({"changes": changes} if changes else {}))


def _finish(trainer: Trainer, folder: Path, recipe: Recipe) -> TrainedRun:
    if trainer.average is not None:
        trainer.average.swap()
    processes = trainer.processes
    model: LanguageModel | None = trainer.model
    if processes.world > 1:
        tensors = gather_parameters(trainer.model)
        model = None
        if processes.main:
            model = recipes.build(recipe, dtype=trainer.settings.dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(tensors[name])
    if processes.main:
        assert model is not None
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        recipes.save(model.eval(), folder / "model")
    progress = trainer.progress
    trainer.log.emit("end", step=progress.step, best=progress.best, model=str(folder / "model"))
    processes.barrier()
    return TrainedRun(model, trainer.log.history, progress.best, folder)


def _resume_command(folder: Path, processes: Processes) -> str:
    command = "titans-train"
    if processes.world > 1:
        command = f"torchrun --nproc-per-node {processes.world} -m titans_build.tools.train"
    return f"{command} --resume --out {folder}"
