"""What a run is refused for before it begins: a recipe, data and settings that do not go together, or not here."""

from __future__ import annotations

from typing import Any

import torch

from ... import recipes
from ...blocks.language_model import LanguageModel
from ...recipes import Recipe
from ...registry import Problem, RecipeError
from ..data import Source, open_source
from .distributed import Processes
from .optimiser import trained
from .settings import Settings


def check_run(recipe: Recipe, data: Any, settings: Settings) -> Source:
    """Raise ``RecipeError`` where a run of one process could not begin; the data to train on. No weights are made."""
    source, _ = open_sources(recipe, data, settings, Processes(device=find_device(settings.device)))
    check_model(recipes.build(recipe, device="meta"), source, settings)
    return source


def find_device(name: str) -> torch.device:
    """The device of this name. Raises ``RecipeError`` where this machine has none."""
    try:
        return recipes.as_device(name)
    except ValueError as error:
        raise RecipeError([Problem("device", str(error))], "settings") from None


def open_sources(recipe: Recipe, data: Any, settings: Settings, group: Processes) -> tuple[Source, Source | None]:
    """This process's share of the data, to train on and to validate with. Raises ``RecipeError``."""
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
            part=group.part,
            vocab=recipe.vocab,
        )

    source, valid = opened("train"), opened("valid") if settings.valid_every else None
    share = settings.batch // group.world
    if share % settings.accumulate:
        message = (
            f"expected a divisor of the {share} rows of each of {group.world} processes, got {settings.accumulate}"
        )
        raise RecipeError([Problem("accumulate", message)], "settings")
    if settings.windows > 1 and not source.carries:
        message = f"the data's batches do not go on from each other, so {settings.carry} of them have nothing to carry"
        raise RecipeError([Problem("carry", message)], "settings")
    return source, valid


def check_model(model: LanguageModel, source: Source, settings: Settings) -> None:
    """Raise ``RecipeError`` where a model cannot be trained as the settings say."""
    trained(model, settings)
    if source.carries and settings.carry != "off" and model.grows:
        message = (
            "the model's state grows with every token read (attention without a window): give it one, or carry: off"
        )
        raise RecipeError([Problem("carry", message)], "settings")
