"""Builds the model of a recipe on a device."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..blocks.build import check_seed, materialize
from ..blocks.device import as_device, as_dtype
from ..blocks.fingerprint import Fingerprint
from ..blocks.language_model import LanguageModel
from .loading import Source, load_recipe
from .parse import recipe_error
from .recipe import Recipe


def build(
    recipe: Recipe | Source,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    seed: int | None = 0,
    overrides: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Build the model of a recipe, with newly initialized parameters. ``model.recipe`` is the recipe, and
    ``model.tokenizer`` ``None``.

    ``recipe``: a ``Recipe``, or an argument of ``load_recipe``. ``overrides``: values by path, as in ``load_recipe``:
    ``build("mac", overrides={"dim": 64})``. ``device``: on ``"meta"`` the model has shapes but no values. ``dtype``: of
    the parameters, as a torch dtype or its name. ``seed``: the same seed gives the same model on every device; ``None``
    uses the global generator.

    Raises ``RecipeError`` if the recipe is invalid or the model is too large for the machine's memory, and
    ``ValueError`` for an unavailable device, a dtype that parameters cannot have, or an invalid seed.
    """
    check_seed(seed)
    if not isinstance(recipe, Recipe) or overrides:
        recipe = load_recipe(recipe, overrides)
    device, dtype = as_device(device), as_dtype(dtype)
    model = assemble(recipe)
    if device.type == "meta":
        model.to(dtype=dtype)
        return model
    # checked first, because the system kills a process that runs out of memory
    lacking = shortage(model, recipe, dtype)
    if lacking is not None:
        raise recipe_error(recipe.name or "recipe", lacking)
    materialize(model, device, dtype, seed)
    return model


def assemble(recipe: Recipe) -> LanguageModel:
    """Build the model on the meta device."""
    layers = [copy.deepcopy(recipe.layers[name]) for name in recipe.expand()]
    fingerprint = Fingerprint(recipe.fingerprint, recipe.name or "", recipe.earlier_fingerprint)
    with _possible(recipe), torch.device("meta"):
        model = LanguageModel(recipe.dim, vocab=recipe.vocab, layers=layers, tie=recipe.tie, fingerprint=fingerprint)
    model.recipe = recipe  # type: ignore[assignment] # torch declares every attribute a tensor or a module
    model.tokenizer = None  # type: ignore[assignment]
    return model


def state_bytes(model: LanguageModel, recipe: Recipe) -> int | None:
    """Bytes of the initial state of one row. On the meta device nothing is allocated.

    ``None`` if a custom block cannot create its state on that device. Raises ``RecipeError`` if the state is too large
    for any tensor.
    """
    with _possible(recipe):
        try:
            return model.state_bytes()
        except Exception as error:
            if _too_large(error):
                raise
            return None


def shortage(model: LanguageModel, recipe: Recipe, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a model on the meta device does not fit into the memory of this machine. ``None`` if it does."""
    have = machine_memory()
    if have is None:
        return None
    # parameters are initialized in float32 on the CPU, and converted afterwards
    parameters = sum(tensor.numel() for tensor in model.parameters()) * max(4, dtype.itemsize)
    state = state_bytes(model, recipe) or 0
    if parameters + state <= have:
        return None
    return (
        f"the model needs {parameters / 2**30:,.1f} GiB for its parameters and {state / 2**30:,.1f} GiB for the state "
        f"of one row; this machine has {have / 2**30:,.1f} GiB"
    )


def machine_memory() -> int | None:
    """Bytes of memory of this machine, or of the container this process runs in. ``None`` if unknown."""
    try:
        have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            have = min(have, int(Path(limit).read_text(encoding="ascii")))
    return have


@contextlib.contextmanager
def _possible(recipe: Recipe) -> Iterator[None]:
    """Raise ``RecipeError`` in place of torch's error for a shape that is too large for any tensor."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if not _too_large(error):
            raise
        first = str(error).partition("\n")[0]
        raise recipe_error(recipe.name or "recipe", f"no such model can exist: {first}") from error


def _too_large(error: Exception) -> bool:
    return "overflow" in str(error).lower()
