"""``train``: a run from its beginning, or from where it was left, to its end."""

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
from .beforehand import check_model, find_device, open_sources
from .distributed import Processes, gathered, processes
from .folder import changed, described, expect_the_same_data, is_run, locked, record, recorded
from .journal import Event, Journal
from .keeping import Checkpoints
from .loop import Loop
from .optimiser import idle_patterns
from .recomputing import recomputing
from .settings import Settings, as_settings
from .stopping import Stopping


class TrainedRun(NamedTuple):
    """What ``train`` gives back. Where several processes train, the first alone has a model and a history."""

    model: LanguageModel | None
    """As saved in ``out/model``: with the averaged weights, where they are averaged."""
    history: list[Event]
    """Every event that was logged, from the beginning of the run."""
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

    ``recipe``: what ``load_recipe`` takes. ``data``: what ``open_source`` takes. ``settings``: a mapping, a YAML file,
    or ``None`` for the defaults: see ``Settings``. ``on_event``: is told what happens (``Journal``). ``weights``: the
    folder of a saved model of the same recipe to begin with. ``resume``: go on with the run in ``out``, where there is
    one; recipe and data may then be ``None``, and settings only those that change. Under ``torchrun`` its processes
    share the work.

    The folder gets recipe.yaml, train.yaml and run.json, log.jsonl, tensorboard/, checkpoints/ and at the end model/.
    Ctrl-C saves a checkpoint and raises ``KeyboardInterrupt``, the second one ends the process. Raises ``RecipeError``
    for wrong recipes, data and settings, ``StorageError`` for a folder that cannot be used, and ``CommandFailed`` where
    training fails: a loss that is no number, a disk that is full.
    """
    place = Path(out)
    goes_on = resume and is_run(place)
    changes: dict[str, Any] = {}
    run: dict[str, Any] = {}
    if goes_on:
        run = described(place)
        recipe, data, settings, changes = _as_before(place, recipe, data, settings)
    elif is_run(place):
        raise StorageError(f"{place}: there is a run in this folder; resume it (--resume), or choose another folder")
    elif recipe is None or data is None:
        raise StorageError(f"{place}: there is no run in this folder to go on with; give a recipe and data for one")
    settings = as_settings(settings)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    device = find_device(settings.device)
    numbers: list[int] | None = [] if device.type == "cpu" else None
    group = processes(device)
    with torch.random.fork_rng(numbers), contextlib.ExitStack() as stack:
        source, valid = open_sources(recipe, data, settings, group)
        expect_the_same_data(place, run.get("data"), source.describe())
        if group.main:
            stack.enter_context(locked(place))
        checkpoints = Checkpoints(place / "checkpoints")
        _check_steps(settings, max(checkpoints.steps(), default=0) if goes_on else 0)
        weights = run.get("weights") if goes_on else None if weights is None else os.path.abspath(weights)
        model = _model(recipe, settings, group, None if goes_on and checkpoints.steps() else weights)
        check_model(model, source, settings)
        torch.manual_seed(settings.seed + group.rank)
        journal = Journal(place if group.main else None, on_event, tensorboard=settings.tensorboard)
        stack.callback(journal.close)
        if settings.recompute:
            stack.enter_context(recomputing(model))
        loop = Loop(model, source, valid, settings, group, journal, checkpoints, _resuming(place, group))
        if group.main:
            if not goes_on or changes:
                record(place, recipe, data, settings, source.describe(), weights=weights, processes=group.world)
            checkpoints.clear()
        _begin(loop, goes_on, changes)
        with stack.enter_context(Stopping()) as stopping:
            loop.run(stopping)
        return _finish(loop, place, recipe)


def _as_before(
    place: Path, recipe: RecipeSource | None, data: Any, settings: Any
) -> tuple[Recipe, Any, Settings, dict[str, Any]]:
    """The recipe, data and settings of the run in a folder, with what may be changed; and what was."""
    known, known_data, before = recorded(place, allow_imports=isinstance(recipe, Recipe))
    if recipe is not None:
        given = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        if given.fingerprint != known.fingerprint:
            whose = "another recipe" if known.name is None else show(known.name)
            message = f"the run is of {whose} ({known.fingerprint}), not of this one ({given.fingerprint})"
            raise RecipeError([Problem("", message)], given.name or "recipe")
    if data is not None and data != known_data:
        raise RecipeError(
            [Problem("", f"the run reads {show(known_data)}, and cannot go on with {show(data)}")], "data"
        )
    if isinstance(settings, Mapping):
        settings = {**before.to_dict(), **settings}
    after = before if settings is None else as_settings(settings)
    return known, known_data, after, changed(place, before, after)


def _check_steps(settings: Settings, done: int) -> None:
    if settings.steps < done:
        message = f"the run has done {done:,} steps: expected at least so many, got {settings.steps:,}"
        raise RecipeError([Problem("steps", message)], "settings")


def _model(recipe: Recipe, settings: Settings, group: Processes, weights: Any) -> LanguageModel:
    if weights is None:
        return recipes.build(recipe, device=group.device, dtype=settings.dtype, seed=settings.seed)
    model = recipes.load(weights, device=group.device, dtype=settings.dtype, overrides=recipe.overrides)
    if model.recipe.fingerprint != recipe.fingerprint:  # type: ignore[union-attr]
        raise StorageError(f"{weights}: the saved model is of another recipe than {show(recipe.name or 'this one')}")
    return model


def _begin(loop: Loop, goes_on: bool, changes: dict[str, Any]) -> None:
    """Start, or load the last whole checkpoint, which the first process looks for."""
    warnings = idle_patterns(loop.model, loop.settings.no_decay)
    found = loop.checkpoints.latest(warnings.append) if goes_on and loop.processes.main else None
    step = int(loop.processes.total(found[0] if found else 0)[0])
    if step:
        facts = found[1] if found is not None else loop.checkpoints.facts(step)
        loop.load(step, facts)
    loop.journal.open(step)
    for warning in warnings:
        loop.journal.say("warning", step=step, message=warning)
    loop.journal.say("start", step=step, steps=loop.settings.steps, **({"changes": changes} if changes else {}))


def _finish(loop: Loop, place: Path, recipe: Recipe) -> TrainedRun:
    if loop.average is not None:
        loop.average.swap()
    model: LanguageModel | None = loop.model
    if loop.processes.world > 1:
        tensors = gathered(loop.model)
        model = None
        if loop.processes.main:
            model = recipes.build(recipe, dtype=loop.settings.dtype)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(tensors[name])
    if loop.processes.main:
        assert model is not None
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        recipes.save(model.eval(), place / "model")
    best = loop.progress.best
    loop.journal.say("end", step=loop.progress.step, best=best, model=str(place / "model"))
    loop.processes.wait()
    return TrainedRun(model if loop.processes.main else None, loop.journal.history, best, place)


def _resuming(place: Path, group: Processes) -> str:
    """The command that goes on with the run."""
    command = "titans-train"
    if group.world > 1:
        command = f"torchrun --nproc-per-node {group.world} -m titans_build.tools.train"
    return f"{command} --resume --out {place}"
