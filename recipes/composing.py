"""From a recipe to a model on a device."""

from __future__ import annotations

import copy
import os

import torch
from torch import nn

from ..blocks.block import check_seed, materialise
from ..blocks.language_model import LanguageModel
from ..registry import Problem, RecipeError, nearest, show
from .loading import Source, load_recipe
from .recipe import Recipe

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def build(
    recipe: Recipe | Source,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    seed: int | None = 0,
) -> LanguageModel:
    """The model that a recipe describes, with fresh parameters. ``model.recipe`` is the recipe.

    ``recipe``: a ``Recipe``, or anything ``load_recipe`` takes. ``device``: on ``"meta"`` the model has shapes and
    no values. ``dtype``: of the parameters, as a torch dtype or its name. ``seed``: one seed gives one model on
    every device; ``None`` draws from the global generator.

    Raises ``RecipeError`` for what is wrong with the recipe, a model too large for the machine's memory included,
    and ``ValueError`` for a device or dtype that cannot be had or a seed that is none.
    """
    check_seed(seed)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    device, dtype = as_device(device), as_dtype(dtype)
    model = assemble(recipe)
    if device.type == "meta":
        model.to(dtype=dtype)
        return model
    _check_size(model, recipe, dtype)
    materialise(model, device, dtype, seed)
    return model


def assemble(recipe: Recipe) -> LanguageModel:
    """The model on the meta device: every shape, no values."""
    layers = [copy.deepcopy(recipe.layers[name]) for name in recipe.expand()]
    try:
        with torch.device("meta"):
            model = LanguageModel(recipe.dim, vocab=recipe.vocab, layers=layers, tie=recipe.tie)
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        # a shape too large for any tensor; torch's message names neither the block nor the recipe
        first = str(error).partition("\n")[0]
        raise RecipeError([Problem("", f"no such model can exist: {first}")], recipe.name or "recipe") from error
    model.recipe = recipe  # type: ignore[assignment] # torch declares every attribute a tensor or a module
    return model


def as_device(device: torch.device | str) -> torch.device:
    """A device that exists here. Raises ``ValueError``."""
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"unknown device {show(device)}: expected cpu, cuda, cuda:1, mps or meta") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this machine, or this build of torch, has no CUDA GPU")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device {device}: there are {torch.cuda.device_count()} CUDA GPUs, counted from 0")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: not available here")
    return device


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A floating-point dtype from itself or its name. Raises ``ValueError`` with the nearest name."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {show(dtype)}{nearest(dtype, DTYPES)} (dtypes: {', '.join(DTYPES)})")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ValueError(f"expected a dtype for parameters ({', '.join(DTYPES)}), got {show(dtype)}")
    return dtype


def _check_size(model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> None:
    """Refuse what memory cannot hold: the kernel would end the process without a word."""
    # parameters are drawn in float32 on the CPU, whatever they become
    need = sum(tensor.numel() for tensor in model.parameters()) * max(4, dtype.itemsize)
    try:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return
    if need > have:
        message = (
            f"the model needs {need / 2**30:,.1f} GiB for its parameters; this machine has {have / 2**30:,.1f} GiB"
        )
        raise RecipeError([Problem("", message)], recipe.name or "recipe")
