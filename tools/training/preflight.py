"""Checks before a run begins: that the recipe, the data and the settings fit together and this machine."""

from __future__ import annotations

from typing import Any

import torch

from ... import recipes
from ...blocks.language_model import LanguageModel
from ...recipes import Recipe
from ...registry import Problem, RecipeError
from ..data import Source, open_source
from .distributed import Processes
from .optimizer import trainable_parameters
from .settings import Settings


def check_run(recipe: Recipe, data: Any, settings: Settings) -> Source:
    """The training data. Raises ``RecipeError`` if a run of one process could not begin. Allocates no weights."""
    source, _ = open_sources(recipe, data, settings, Processes(device=find_device(settings.device)))
    check_model(recipes.build(recipe, device="meta"), source, settings)
    return source


def find_device(name: str) -> torch.device:
    """The device of this name. Raises ``RecipeError`` if this machine has none."""
    try:
        return recipes.as_device(name)
    except ValueError as error:
        raise RecipeError([Problem("device", str(error))], "settings") from None


def open_sources(recipe: Recipe, data: Any, settings: Settings, processes: Processes) -> tuple[Source, Source | None]:
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
            part=(processes.rank, processes.world),
            vocab=recipe.vocab,
        )

    source, valid = opened("train"), opened("valid") if settings.valid_every else None
    rows = settings.batch // processes.world
    if rows % settings.accumulate:
        message = f"expected a divisor of the {rows} rows of each of {processes.world} processes"
        raise RecipeError([Problem("accumulate", f"{message}, got {settings.accumulate}")], "settings")
    if settings.windows > 1 and not source.carries:
        message = (
            f"the data's rows do not continue from batch to batch: there is no state to carry over {settings.carry}"
        )
        raise RecipeError([Problem("carry", message)], "settings")
    return source, valid


def check_model(model: LanguageModel, source: Source, settings: Settings) -> None:
    """Raise ``RecipeError`` if a model cannot be trained with the settings."""
    trainable_parameters(model, settings)
    if source.carries and settings.carry != "off" and model.grows:
        message = "the model's state grows with every token (attention without a window): set a window, or carry: off"
        raise RecipeError([Problem("carry", message)], "settings")
