"""Saves and loads states: one safetensors file each, which names the recipe of the model."""

from __future__ import annotations

import os

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..blocks.language_model import LanguageModel
from ..blocks.state import State, map_state, named_tensors
from ..registry import show
from .atomic_write import atomic_write
from .saved_format import (
    STATE_FORMAT,
    VERSION,
    StorageError,
    as_path,
    checksum,
    expect_checksum,
    list_differences,
    open_tensors,
    recipe_of,
    storable,
    write_errors,
)


def save_state(state: State, path: str | os.PathLike[str], model: LanguageModel) -> None:
    """Write a state of ``model`` to a safetensors file, which is replaced atomically.

    Raises ``StorageError`` if ``state`` is not a state of this model, or if the file cannot be written.
    """
    recipe = recipe_of(model)
    tensors = _named(state)
    rows = _rows(tensors, "the state")
    _check(tensors, model, rows, "the state")
    file = as_path(path, "path")
    stored = storable(tensors)
    metadata = {
        "format": STATE_FORMAT,
        "version": str(VERSION),
        "fingerprint": recipe.fingerprint,
        "recipe": recipe.name or "",
        "rows": str(rows),
        "checksum": checksum(stored),
    }
    with write_errors(file), atomic_write(file) as temporary:
        save_file(stored, temporary, metadata)


def load_state(path: str | os.PathLike[str], model: LanguageModel) -> State:
    """Load a state of ``model``, on the device of the model and in the dtypes of the model's states.

    Where these are the dtypes that were saved, all values are bit-identical. Otherwise floating-point tensors are
    converted.

    Raises ``StorageError`` if the file is not a saved state, is damaged, or belongs to a model of another recipe.
    """
    recipe = recipe_of(model)
    place = as_path(path, "path")
    if not place.is_file():
        raise StorageError(f"{place}: {'not a file' if place.exists() else 'no such file'}; expected a saved state")
    with open_tensors(place, STATE_FORMAT) as file:
        metadata = file.metadata()
        if metadata.get("fingerprint") != recipe.fingerprint:
            raise StorageError(
                f"{place}: the state belongs to another recipe: it was saved with "
                f"{show(metadata.get('recipe') or 'a recipe')} ({metadata.get('fingerprint')}), the model is of "
                f"{show(recipe.name or 'a recipe')} ({recipe.fingerprint})"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    expect_checksum(metadata, checksum(tensors), place)
    rows = _rows(tensors, str(place))
    if metadata.get("rows") != str(rows):
        raise StorageError(f"{place}: expected {metadata.get('rows')} rows, got {rows}")
    fresh = _check(tensors, model, rows, str(place))
    names = iter(_named(fresh))
    device = next(model.parameters()).device
    return map_state(lambda old: tensors[next(names)].to(device, old.dtype, copy=True), fresh)


def _named(state: State) -> dict[str, Tensor]:
    return {f"state.{path}" if path else "state": tensor for path, tensor in named_tensors(state)}


def _rows(tensors: dict[str, Tensor], what: str) -> int:
    counts = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1 or None in counts.values():
        shown = "; ".join(f"{name} has {count}" for name, count in list(counts.items())[:3])
        raise StorageError(f"{what}: the tensors disagree about the number of rows: {shown}")
    return next(iter(counts.values()), 0) or 0


def _check(tensors: dict[str, Tensor], model: LanguageModel, rows: int, what: str) -> State:
    """Raise ``StorageError`` unless ``tensors`` are a state of ``model``. Return a fresh state."""
    with torch.no_grad():
        fresh = model.init_state(max(rows, 1))
    expected = _named(fresh)
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is not part of this model's state" for name in tensors if name not in expected]
    grows = any(getattr(module, "grows", False) for module in model.modules())
    for name in expected.keys() & tensors.keys():
        found, wanted = tensors[name], expected[name]
        # a state that grows does so along dimension 1, time
        fixed = (0, *range(2 if grows else 1, wanted.dim()))
        if found.dim() != wanted.dim() or any(found.shape[d] != wanted.shape[d] for d in fixed):
            wrong.append(f"{name} is {list(found.shape)}, expected {list(wanted.shape)}")
        elif found.dtype != wanted.dtype and not (found.is_floating_point() and wanted.is_floating_point()):
            wrong.append(f"{name} is {found.dtype}, expected {wanted.dtype}")
    if wrong:
        raise StorageError(f"{what} is not a state of this model: {list_differences(wrong)}")
    try:
        model.fingerprint.check(tensors["state.recipe"])
    except ValueError as error:
        raise StorageError(f"{what}: {error}") from None
    return fresh
