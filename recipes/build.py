"""From a recipe to a model on a device."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from ..blocks.build import check_seed, materialise
from ..blocks.device import as_device, as_dtype
from ..blocks.fingerprint import Origin
from ..blocks.language_model import LanguageModel
from ..registry import Problem, RecipeError
from .loading import Source, load_recipe
from .recipe import Recipe


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
    have = machine_memory()
    if have is None:
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


def machine_memory() -> int | None:
    """Bytes of this machine's memory, or of the part of it that a container may use; ``None`` where none can be had."""
    try:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max", where there is no limit
            have = min(have, int(Path(limit).read_text(encoding="ascii")))
    return have


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
