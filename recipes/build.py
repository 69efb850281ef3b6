"""Builds the model of a recipe on a device."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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
    if device.type == "meta":
        return assemble(recipe).to(dtype=dtype)
    # checked first, because the system kills a process that runs out of memory
    lacking = shortage(measure(recipe), dtype)
    if lacking is not None:
        raise recipe_error(recipe.name or "recipe", lacking)
    model = assemble(recipe)
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


class Size(NamedTuple):
    """The size of a model."""

    parameters: int
    state_bytes: int | None
    """Bytes of the initial state of one row. ``None`` if a custom block cannot create it on the meta device."""
    grows: bool
    """Whether the state grows with the number of tokens."""


def measure(recipe: Recipe) -> Size:
    """Measure the model of a recipe on the meta device, with each distinct layer built once. Nothing is allocated.

    Raises ``RecipeError`` if a tensor is too large to exist.
    """
    counts = Counter(recipe.expand())
    model = assemble(dataclasses.replace(recipe, stack=list(counts)))
    repeated = [(layer, count - 1) for layer, count in zip(model.layers, counts.values())]
    parameters = _numbers(model) + sum(more * _numbers(layer) for layer, more in repeated)
    state = state_bytes(model, recipe)
    if state is not None:
        with _possible(recipe):
            state += sum(more * layer.state_bytes() for layer, more in repeated if more)
    return Size(parameters, state, model.grows)


def _numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def state_bytes(model: LanguageModel, recipe: Recipe) -> int | None:
    """Bytes of the initial state of one row of a model on the meta device; see ``Size``."""
    with _possible(recipe):
        try:
            return model.state_bytes()
        except Exception as error:
            if _too_large(error):
                raise
            return None


def shortage(size: Size, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a model of this size does not fit into the memory of this machine. ``None`` if it does."""
    have = machine_memory()
    if have is None:
        return None
    # parameters are initialized in float32 on the CPU, and converted afterwards
    parameters, state = size.parameters * max(4, dtype.itemsize), size.state_bytes or 0
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
