"""``train``: a run from its beginning, or from its last checkpoint, to its end."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import recipes
from ...blocks.language_model import LanguageModel
from ...recipes import Recipe, StorageError, load_recipe
from ...recipes.atomic_write import remove_stale
from ...recipes.loading import Source as RecipeSource
from ...recipes.parse import recipe_error
from ...recipes.saved_format import INDEX, MODEL, as_path
from ...recipes.storage import gathered
from ...registry import Problem, RecipeError, show
from ..data import Source, open_source
from ..data.open_source import as_mapping
from ..randomness import ORDER
from ..terminal import first_process_first
from .checkpoint import CheckpointManager, verify
from .distributed import Processes, init_processes, process_errors
from .log import Event, EventLog
from .optimizer import trainable_parameters, unmatched_patterns
from .run_folder import (
    check_data_order,
    check_same_data,
    data_of_model,
    data_of_run,
    is_run,
    locked,
    read_inputs,
    read_run,
    setting_changes,
    write_run,
)
from .settings import Settings, as_settings, recipes_of_stages
from .train_step import AUXILIARY, activation_checkpointing
from .trainer import Interrupt, Trainer

HAS_RUN = "this folder has a run; resume it (--resume), or choose another folder"


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
    Under ``torchrun`` the processes share the work. Ctrl-C saves a checkpoint and raises ``KeyboardInterrupt``;
    SIGTERM and SIGHUP save one and raise ``SystemExit`` with the status of the signal; a second one ends the process.

    Raises ``RecipeError`` for invalid recipes, data and settings, ``StorageError`` for a folder that cannot be used,
    and ``CommandFailed`` if training fails: a nonfinite loss, a full disk.
    """
    with first_process_first():
        folder = as_path(out, "out")
        resuming = resume and is_run(folder)
        run: dict[str, Any] = {}
        changes: dict[str, Any] = {}
        if resuming:
            run = read_run(folder)
            weights = run.get("weights")
            recipe, data, settings, changes = _resumed_inputs(folder, recipe, data, settings)
        elif is_run(folder):
            raise StorageError(f"{folder}: {HAS_RUN}")
        elif (folder / MODEL / INDEX).exists():
            message = "a saved model is there, which the model of the run would replace: choose another folder"
            raise StorageError(f"{folder / MODEL}: {message}")
        elif recipe is None or data is None:
            raise StorageError(f"{folder}: this folder has no run to resume; give a recipe and data to start one")
        settings = as_settings(settings)
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        parts = _parts(recipe, settings)
        device = _find_device(settings.device)
    processes = init_processes(device)
    command = "titans-train"
    if processes.world > 1:
        command = f"torchrun --nproc-per-node {processes.world} -m titans_build.tools.train"
    command += f" --resume --out {folder}"
    with (
        process_errors(processes, command),
        torch.random.fork_rng([] if device.type == "cpu" else None),
        contextlib.ExitStack() as stack,
    ):
        processes.arrange(settings.mesh)
        tokenized = data_of_run(folder, data) if resuming else data_of_model(weights, data)
        source, valid = _open_sources(recipe, tokenized, settings, processes)
        check_same_data(folder, run.get("data"), source.describe())
        if processes.main:
            stack.enter_context(locked(folder))
            if is_run(folder) and not resuming:  # begun since the first check, and finished by now
                raise StorageError(f"{folder}: {HAS_RUN}")
        checkpoints = CheckpointManager(folder / "checkpoints")
        done = max(checkpoints.steps(), default=0) if resuming else 0
        if settings.steps < done:
            message = f"expected at least the {done:,} steps that the run has done, got {settings.steps:,}"
            raise RecipeError([Problem("steps", message)], "settings")
        step, facts, warnings = 0, None, list[str]()
        if processes.main and resuming:
            step, facts = checkpoints.latest(warnings.append) or (0, None)
            if step < settings.steps:
                check_data_order(folder)
        step = int(processes.sum(step)[0])  # the other processes have 0
        first = min(sum(part.stop <= step for part in parts), len(parts) - 1)
        placement: dict[str, Any] = {"device": processes.device, "dtype": settings.dtype}
        if weights is None or step:
            model = recipes.build(parts[first].recipe, **placement, seed=settings.seed)
        else:
            model = recipes.load(weights, **placement, overrides=parts[first].recipe.overrides)
            if model.recipe.fingerprint != parts[first].recipe.fingerprint:  # type: ignore[union-attr]
                name = show(recipe.name or "this one")
                raise StorageError(f"{weights}: the saved model is of another recipe than {name}")
            if "text" in as_mapping(data) and not _same_tokenizer(model.tokenizer, source.tokenizer):  # type: ignore[arg-type]
                raise StorageError(f"{weights}: the saved model has another tokenizer than the data")
        model.tokenizer = source.tokenizer or model.tokenizer  # type: ignore[assignment]
        for part in parts[:first] + parts[first + 1 :]:
            _check_model(recipes.build(part.recipe, device="meta"), source, settings)
        _check_model(model, source, settings)
        torch.manual_seed(settings.seed + processes.rank)
        log = EventLog(folder if processes.main else None, on_event, tensorboard=settings.tensorboard)
        stack.callback(log.close)
        inner = stack.enter_context(contextlib.ExitStack())

        def make_trainer(model: LanguageModel, stop: int) -> Trainer:
            made, mesh = (
                Trainer(model, source, valid, settings, processes, log, checkpoints, command, stop),
                settings.mesh,
            )
            if settings.recompute and (mesh is None or mesh.context == 1):
                # after the trainer has shared out the model: what is recomputed gathers parameters again
                inner.enter_context(activation_checkpointing(model))
            return made

        trainer = make_trainer(model, parts[first].stop)
        warnings += unmatched_patterns(model, settings.no_decay)
        if processes.main:
            if not resuming or changes:
                more = {
                    "data_order": run.get("data_order") if resuming else ORDER,
                    "weights": None if weights is None else os.path.abspath(weights),
                    "processes": processes.world,
                }
                write_run(folder, recipe, data, settings, source, **more)
            checkpoints.remove_temporary()
            remove_stale(folder)
        processes.barrier()
        if step:
            of = next(part.recipe for part in parts if step <= part.stop)
            trainer.load(step, facts or verify(checkpoints.path(step)), of)
        log.open(step)
        for warning in warnings:
            log.emit("warning", step=step, message=warning)
        more_about_start = {"changes": changes} if changes else {}
        if source.packed:
            described = source.describe()
            names = ("documents_cut", "length", "padded", "padded_share")
            packing = {"documents": described["files_of_this_split"], "rows": described["windows"]}
            more_about_start["packing"] = packing | {name: described[name] for name in names}
        log.emit("start", step=step, steps=settings.steps, **more_about_start)
        with Interrupt() as interrupt:
            trainer.run(interrupt)
            for before, part in pairwise(parts[first:]):
                tokenizer = model.tokenizer
                inner.close()
                del model, trainer  # before the next ones are made
                # with a seed, because all processes share out the same weights; the checkpoint has those of the run
                model = recipes.build(part.recipe, **placement, seed=settings.seed)
                model.tokenizer = tokenizer
                trainer = make_trainer(model, part.stop)
                trainer.load(before.stop, verify(checkpoints.path(before.stop)), before.recipe)
                trainer.run(interrupt)
        return _finish(trainer, folder, parts[-1].recipe)


class Part(NamedTuple):
    """Stages in a row that have one recipe, and the step at which they end."""

    recipe: Recipe
    stop: int


def _parts(recipe: Recipe, settings: Settings) -> list[Part]:
    """The parts of a run. Raises ``RecipeError`` for changes of the recipe that its weights do not allow."""
    parts, step = list[Part](), 0
    for stage, changed in zip(settings.all_stages, recipes_of_stages(recipe, settings)):
        step += stage.steps
        if parts and parts[-1].recipe == changed:
            parts.pop()
        parts.append(Part(changed, step))
    return parts


def _resumed_inputs(
    folder: Path, recipe: RecipeSource | None, data: Any, settings: Any
) -> tuple[Recipe, Any, Settings, dict[str, Any]]:
    """The recipe, data and settings of the run in a folder, and the settings that change."""
    given = recipe if recipe is None or isinstance(recipe, Recipe) else load_recipe(recipe)
    known, known_data, before = read_inputs(folder, imports=() if given is None else given.imports)
    if given is not None and given.fingerprint != known.fingerprint:
        whose = "another recipe" if known.name is None else show(known.name)
        message = f"the run is of {whose} ({known.fingerprint}), not of this one ({given.fingerprint})"
        raise recipe_error(given.name or "recipe", message)
    if data is not None and data != known_data:
        raise recipe_error("data", f"the run reads {show(known_data)} and cannot be resumed with {show(data)}")
    given_settings = settings
    if isinstance(settings, Mapping):
        settings = {**before.to_dict(), **settings}
    after = before if settings is None else as_settings(settings)
    if after.mesh is not None and not (isinstance(given_settings, Mapping) and "mesh" in given_settings):
        world, mesh = int(os.environ.get("WORLD_SIZE", "1")), after.mesh
        if (mesh.data or 1) * mesh.context * mesh.tensor != world:  # other processes, which share the rows
            after = after.model_copy(update={"mesh": None})
    return known, known_data, after, setting_changes(folder, before, after)


def _same_tokenizer(saved: str | None, given: str | None) -> bool:
    """Whether a saved model can be trained on the tokens of a tokenizer. One without a tokenizer takes any."""
    return saved in (None, given) or (given is not None and json.loads(saved) == json.loads(given))


def _finish(trainer: Trainer, folder: Path, recipe: Recipe) -> TrainedRun:
    if trainer.average is not None:
        trainer.average.swap()
    processes = trainer.processes
    model: LanguageModel | None = trainer.model
    if processes.world > 1:
        weights = gathered({name: parameter.detach() for name, parameter in trainer.model.named_parameters()})
        model = recipes.build(recipe, dtype=trainer.settings.dtype) if processes.main else None
        if model is not None:
            model.load_state_dict(weights, strict=False)
            model.tokenizer = trainer.model.tokenizer
    if model is not None:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = None
        recipes.save(model.eval(), folder / MODEL, overwrite=True)
    progress = trainer.progress
    trainer.log.emit("end", step=progress.step, best=progress.best, model=str(folder / MODEL))
    processes.barrier()
    return TrainedRun(model, trainer.log.history, progress.best, folder)


# -- checks before a run begins ----------------------------------------------------------------------------------------


def check_run(recipe: Recipe, data: Any, settings: Settings) -> Source:
    """The training data. Raises ``RecipeError`` if a run of one process could not begin. Allocates no weights."""
    parts = _parts(recipe, settings)
    source, _ = _open_sources(recipe, data, settings, Processes(device=_find_device(settings.device)))
    for part in parts:
        _check_model(recipes.build(part.recipe, device="meta"), source, settings)
    return source


def _find_device(name: str) -> torch.device:
    """The device of this name. Raises ``RecipeError`` if this machine has none."""
    try:
        return recipes.as_device(name)
    except ValueError as error:
        raise RecipeError([Problem("device", str(error))], "settings") from None


def _open_sources(recipe: Recipe, data: Any, settings: Settings, processes: Processes) -> tuple[Source, Source | None]:
    """This process's part of the training and validation data. Raises ``RecipeError``."""
    if recipe.vocab is None:
        message = "a model without a vocabulary cannot read tokens"
        raise RecipeError([Problem("vocab", message)], recipe.name or "recipe")

    def opened(split: Any) -> Source:
        return open_source(
            data,
            rows=settings.batch,
            length=settings.length,
            split=split,
            seed=settings.seed,
            part=(processes.group, processes.groups),
            vocab=recipe.vocab,
        )

    source, valid = opened("train"), opened("valid") if settings.valid_every else None
    if recipe.vocab > 256 and source.describe().get("tokens_are") == "bytes" and not as_mapping(data).get("tokenizer"):
        message = (
            f"the model has {recipe.vocab:,} tokens, text without a tokenizer only the 256 values of a byte: give "
            f"--tokenizer FILE (`titans-train tokenizer TEXTS --vocab {recipe.vocab} --out FILE` makes one), or the "
            "recipe `vocab: 256`"
        )
        raise RecipeError([Problem("vocab", message)], "data")
    rows = settings.batch // processes.groups
    if rows % settings.accumulate:
        message = f"expected a divisor of the {rows} rows of each of {processes.groups} processes"
        raise RecipeError([Problem("accumulate", f"{message}, got {settings.accumulate}")], "settings")
    context = 1 if settings.mesh is None else settings.mesh.context
    if source.length % context:
        message = f"{source.length} tokens of a row cannot be shared by context: {context} processes: give a multiple"
        raise RecipeError([Problem("length", message)], "settings")
    if settings.windows > 1 and not source.carries:
        message = (
            f"the data's rows do not continue from batch to batch: there is no state to carry over {settings.carry}"
        )
        raise RecipeError([Problem("carry", message)], "settings")
    unpacked = [name for name in ("compile", *AUXILIARY) if getattr(settings, name)]
    if source.packed and unpacked:
        message = "it cannot be used with packed documents: leave out this setting, or `pack: documents` of the data"
        raise RecipeError([Problem(name, message) for name in unpacked], "settings")
    return source, valid


def _check_model(model: LanguageModel, source: Source, settings: Settings) -> None:
    """Raise ``RecipeError`` if a model cannot be trained with the settings."""
    trainable_parameters(model, settings)
    if source.carries and settings.carry != "off" and model.grows:
        message = "the model's state grows with every token (attention without a window): set a window, or carry: off"
        raise RecipeError([Problem("carry", message)], "settings")
