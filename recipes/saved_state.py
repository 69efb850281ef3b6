"""Saves and loads states: one safetensors file each, which names the recipe of the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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


def save_state(state: State, path: str | os.PathLike[str], model: LanguageModel, *, overwrite: bool = False) -> None:
    """Write a state of ``model`` to a safetensors file. A state of the same recipe is replaced atomically, any other
    file only with ``overwrite=True``.

    Raises ``StorageError`` if ``state`` is not a state of this model, or if the file cannot be written.
    """
    recipe = recipe_of(model)
    tensors = dict(named_tensors(state, "state"))
    _expect_state_of(model, tensors, "the state")
    rows = _rows(tensors, "the state")
    if not overwrite:
        expect_replaceable(as_path(path, "path"), model)
    write_state_file(
        path, STATE_FORMAT, tensors, fingerprint=recipe.fingerprint, recipe=recipe.name or "", rows=str(rows)
    )


def expect_replaceable(path: Path, model: LanguageModel | None = None) -> None:
    """Raise ``StorageError`` if there is a file that is not a saved state, or not one of the recipe of ``model``."""
    if not path.is_file() or not path.stat().st_size:
        return
    try:
        with open_tensors(path, STATE_FORMAT) as file:
            found = file.metadata().get("fingerprint")
    except StorageError:
        message = "there is a file that is no saved state, which would be replaced"
        raise StorageError(f"{path}: {message} (overwrite=True replaces it)") from None
    recipe = None if model is None else recipe_of(model)
    if recipe is not None and found not in (recipe.fingerprint, recipe.earlier_fingerprint):
        message = "the state in this file belongs to another recipe, and would be replaced"
        raise StorageError(f"{path}: {message} (overwrite=True replaces it)")


def load_state(path: str | os.PathLike[str], model: LanguageModel) -> State:
    """Load a state of ``model``, on the device of the model and in the dtypes of the model's states.

    Where these are the dtypes that were saved, all values are bit-identical. Otherwise floating-point tensors are
    converted.

    Raises ``StorageError`` if the file is not a saved state, is damaged, or belongs to a model of another recipe.
    """
    recipe = recipe_of(model)
    metadata, tensors = read_state_file(path, STATE_FORMAT)
    if metadata.get("fingerprint") not in (recipe.fingerprint, recipe.earlier_fingerprint):
        raise StorageError(
            f"{path}: the state belongs to another recipe: it was saved with "
            f"{show(metadata.get('recipe') or 'a recipe')} ({show(metadata.get('fingerprint'))}), the model is of "
            f"{show(recipe.name or 'a recipe')} ({recipe.fingerprint})"
        )
    rows = _rows(tensors, str(path))
    if metadata.get("rows") != str(rows):
        raise StorageError(f"{path}: expected {show(metadata.get('rows')).strip(chr(39))} rows, got {rows}")
    return fill_state(_expect_state_of(model, tensors, str(path)), tensors, "state")


def write_state_file(path: str | os.PathLike[str], kind: str, tensors: dict[str, Tensor], **metadata: str) -> None:
    """Write ``tensors`` to a safetensors file of format ``kind``, which is replaced atomically.

    Raises ``StorageError`` if the file cannot be written.
    """
    file = as_path(path, "path")
    stored = storable(tensors)
    header = {"format": kind, "version": str(VERSION), **metadata, "checksum": checksum(stored)}
    with write_errors(file), atomic_write(file) as temporary:
        save_file(stored, temporary, header)


def read_state_file(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file that ``write_state_file`` wrote.

    Raises ``StorageError`` if the file is missing, damaged, or of another format.
    """
    place = as_path(path, "path")
    if not place.is_file():
        raise StorageError(f"{place}: {'not a file' if place.exists() else 'no such file'}; expected a saved state")
    with open_tensors(place, kind) as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    expect_checksum(metadata, checksum(tensors), place)
    return metadata, tensors


def expect_state(
    init_state: Callable[[int], State], tensors: dict[str, Tensor], grows: bool, what: str, prefix: str = ""
) -> State:
    """Raise ``StorageError`` unless ``tensors`` are those of a state by their dotted paths. Return a fresh state.

    ``grows``: whether the state may be longer along dimension 1, time, than a fresh one.
    """
    with torch.no_grad():
        fresh = init_state(max(_rows(tensors, what), 1))
    expected = dict(named_tensors(fresh, prefix))
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is not part of this model's state" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        found, wanted = tensors[name], expected[name]
        fixed = (0, *range(2 if grows else 1, wanted.dim()))
        if found.dim() != wanted.dim() or any(found.shape[d] != wanted.shape[d] for d in fixed):
            wrong.append(f"{name} is {list(found.shape)}, expected {list(wanted.shape)}")
        elif found.dtype != wanted.dtype and not (found.is_floating_point() and wanted.is_floating_point()):
            wrong.append(f"{name} is {found.dtype}, expected {wanted.dtype}")
    if wrong:
        raise StorageError(f"{what} is not a state of this model: {list_differences(wrong)}")
    return fresh


def fill_state(fresh: State, tensors: dict[str, Tensor], prefix: str = "") -> State:
    """A copy of ``tensors`` as a state, on the devices and in the dtypes of ``fresh``."""
    names = iter([name for name, _ in named_tensors(fresh, prefix)])
    return map_state(lambda old: tensors[next(names)].to(old.device, old.dtype, copy=True), fresh)


def _expect_state_of(model: LanguageModel, tensors: dict[str, Tensor], what: str) -> State:
    grows = any(getattr(module, "grows", False) for module in model.modules())
    if "state.recipe" in tensors and "state.document" not in tensors:  # saved by version 0.1
        with torch.no_grad():
            tensors["state.document"] = model.init_state(1).document.expand_as(tensors["state.recipe"])
    fresh = expect_state(model.init_state, tensors, grows, what, "state")
    try:
        model.fingerprint.check(tensors["state.recipe"])
    except ValueError as error:
        raise StorageError(f"{what}: {error}") from None
    return fresh


def _rows(tensors: dict[str, Tensor], what: str) -> int:
    counts = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1 or None in counts.values():
        shown = "; ".join(f"{name} has {count}" for name, count in list(counts.items())[:3])
        raise StorageError(f"{what}: the tensors disagree about the number of rows: {shown}")
    return next(iter(counts.values()), 0) or 0
