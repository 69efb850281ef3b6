"""From a recipe to a model on a device."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator

import torch

from ..blocks.block import check_seed, materialise
from ..blocks.language_model import LanguageModel
from ..blocks.origin import Origin
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
    # the system would end the process without a word
    lacking = shortage(model, recipe, dtype)
    if lacking is not None:
        raise RecipeError([Problem("", lacking)], recipe.name or "recipe")
    materialise(model, device, dtype, seed)
    return model


def assemble(recipe: Recipe) -> LanguageModel:
    """The model on the meta device: every shape, no values."""
    layers = [copy.deepcopy(recipe.layers[name]) for name in recipe.expand()]
    origin = Origin(recipe.fingerprint, recipe.name or "")
    with _possible(recipe), torch.device("meta"):
        model = LanguageModel(recipe.dim, vocab=recipe.vocab, layers=layers, tie=recipe.tie, origin=origin)
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


def state_bytes(model: LanguageModel, recipe: Recipe) -> int | None:
    """Bytes of one row's fresh state in a model that may be on the meta device, where nothing is allocated.

    ``None`` where a block of the user's own cannot make its state there. Raises ``RecipeError`` for a state that is
    too large for any tensor.
    """
    with _possible(recipe):
        try:
            return model.state_bytes()
        except Exception as error:
            if _too_large(error):
                raise
            return None


def shortage(model: LanguageModel, recipe: Recipe, dtype: torch.dtype = torch.float32) -> str | None:
    """Why this machine's memory cannot hold a model that is on the meta device, in words; ``None`` if it can."""
    try:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    # parameters are drawn in float32 on the CPU, whatever they become
    parameters = sum(tensor.numel() for tensor in model.parameters()) * max(4, dtype.itemsize)
    state = state_bytes(model, recipe) or 0
    if parameters + state <= have:
        return None
    return (
        f"the model needs {parameters / 2**30:,.1f} GiB for its parameters and {state / 2**30:,.1f} GiB for the state "
        f"of one row; this machine has {have / 2**30:,.1f} GiB"
    )


@contextlib.contextmanager
def _possible(recipe: Recipe) -> Iterator[None]:
    """Turn a shape too large for any tensor into a ``RecipeError``; torch's names neither the block nor the recipe."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if not _too_large(error):
            raise
        first = str(error).partition("\n")[0]
        raise RecipeError([Problem("", f"no such model can exist: {first}")], recipe.name or "recipe") from error


def _too_large(error: Exception) -> bool:
    return "overflow" in str(error).lower()
