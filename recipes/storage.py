"""Models and states on disk: safetensors and a recipe, replaced in one step, read back without running anything.

A model is a folder with one index, ``model.json`` (the recipe by registered names, the name of the weights file,
the format's version), and one weights file whose name is new at every save. A save writes the weights first and
renames the index into place last. Whoever reads the index, at any moment and after a kill at any moment, finds
the old model or the new one, whole: the old weights are removed only when no index names them any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..blocks.build import materialise
from ..blocks.language_model import LanguageModel
from ..blocks.state import State, map_state, named_tensors
from ..registry import Problem, RecipeError, show
from .atomic_write import atomic_write, making_folder
from .build import as_device, as_dtype, assemble
from .loading import load_recipe
from .recipe import Recipe
from .saved_format import (
    INDEX,
    MODEL_FORMAT,
    VERSION,
    WEIGHTS,
    Checksum,
    StorageError,
    checksum,
    expect_version,
    read_index,
)

STATE_FORMAT = "titans-build state"

_LEFTOVER = re.compile(r"\.[\w.-]+\.[0-9a-f]{16}\.tmp")
_STALE_SECONDS = 3600
"""Age at which a file that no index names is taken for the leftover of a killed save, not for one in progress."""


def save(model: LanguageModel, folder: str | os.PathLike[str]) -> None:
    """Write ``model`` into ``folder``, made if need be; a model that was there is replaced in one step.

    The parameters keep their dtypes. What the recipe's ``imports:`` says is left out: a saved model names blocks by
    their registered names only.

    Raises ``StorageError`` when the model is not one that ``build`` or ``load`` made, no longer has the parameters
    of its recipe, is on the meta device, or when the folder cannot be written.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    recipe = _recipe_of(model)
    tensors = _tensors(model)
    _expect_same(_shapes(tensors), _shapes(_tensors(assemble(recipe))), "the model", recipe)
    if any(tensor.is_meta for tensor in tensors.values()):
        raise StorageError("the model is on the meta device: it has no values to save")
    tag = secrets.token_hex(8)
    weights = f"weights-{tag}.safetensors"
    saved = recipe.to_dict()
    saved.pop("imports", None)
    index = {
        "format": MODEL_FORMAT,
        "version": VERSION,
        "recipe": saved,
        "overrides": recipe.overrides,
        "fingerprint": recipe.fingerprint,
        "weights": weights,
    }
    place = _path(folder, "folder")
    with _writing(place), making_folder(place):
        stored = _stored(tensors)
        metadata = {
            "format": MODEL_FORMAT,
            "version": str(VERSION),
            "fingerprint": recipe.fingerprint,
            "tag": tag,
            "checksum": checksum(stored),
        }
        with atomic_write(place / weights) as temporary:
            save_file(stored, temporary, metadata)
        before = _named_weights(place)
        with atomic_write(place / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _clean(place, keep=weights, before=before)


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """The model saved in ``folder``, on ``device``. ``dtype``: of its parameters; ``None`` keeps the saved ones.

    ``overrides``: values of its recipe to change by path, as in ``load_recipe``, as long as the saved weights fit:
    ``{"layers.mac.0.segment": 256}``. The result is a model of another recipe, and refuses the states of this one.

    Runs no code from the folder. Blocks that are not built in have to be registered (their module imported, or their
    package installed) beforehand.

    Raises ``StorageError`` when the folder holds no model, or a damaged or foreign one, ``RecipeError`` for overrides
    that are wrong or that change the weights, and ``ValueError`` for a device or dtype that cannot be had.
    """
    device = as_device(device)
    target = None if dtype is None else as_dtype(dtype)
    place = _path(folder, "folder")
    misses = 0
    for _ in range(100):
        index = read_index(place)
        try:
            return _load(place, index, device, target, overrides or {})
        except FileNotFoundError:
            # a save has replaced the model between the two reads, unless the same weights are missing again and again
            misses += _named_weights(place) == index["weights"] and not (place / index["weights"]).exists()
            if misses == 5:
                break
    raise StorageError(f"{place / index['weights']}: the weights that {INDEX} names are missing")


def _path(given: Any, name: str) -> Path:
    try:
        return Path(given)
    except TypeError:
        raise TypeError(f"{name}: expected a path, got {show(given)}") from None


def save_state(state: State, path: str | os.PathLike[str], model: LanguageModel) -> None:
    """Write a state of ``model`` to one safetensors file, replaced in one step.

    Raises ``StorageError`` when the state is not one of this model, or the file cannot be written.
    """
    recipe = _recipe_of(model)
    tensors = {_state_name(name): tensor for name, tensor in named_tensors(state)}
    rows = _rows(tensors, "the state")
    _check_state(tensors, model, rows, "the state")
    place = _path(path, "path")
    stored = _stored(tensors)
    metadata = {
        "format": STATE_FORMAT,
        "version": str(VERSION),
        "fingerprint": recipe.fingerprint,
        "recipe": recipe.name or "",
        "rows": str(rows),
        "checksum": checksum(stored),
    }
    with _writing(place), atomic_write(place) as temporary:
        save_file(stored, temporary, metadata)


def load_state(path: str | os.PathLike[str], model: LanguageModel) -> State:
    """The state in a file, on the device of ``model`` and in the dtypes that ``model`` keeps its state in.

    Where those are the dtypes it was saved in, it is bit for bit what was saved; to a model of another dtype its
    floating-point tensors are rounded.

    Raises ``StorageError`` when the file is no state, is damaged, or belongs to a model of another recipe.
    """
    recipe = _recipe_of(model)
    place = _path(path, "path")
    if not place.is_file():
        raise StorageError(f"{place}: {'not a file' if place.exists() else 'no such file'}; expected a saved state")
    with _reading(place, STATE_FORMAT) as file:
        metadata = file.metadata()
        if metadata.get("fingerprint") != recipe.fingerprint:
            raise StorageError(
                f"{place}: the state belongs to another recipe: it was saved with "
                f"{show(metadata.get('recipe') or 'a recipe')} ({metadata.get('fingerprint')}), the model is of "
                f"{show(recipe.name or 'a recipe')} ({recipe.fingerprint})"
            )
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    _expect_whole(metadata, checksum(tensors), place)
    rows = _rows(tensors, str(place))
    if metadata.get("rows") != str(rows):
        raise StorageError(f"{place}: expected {metadata.get('rows')} rows, got {rows}")
    template = _check_state(tensors, model, rows, str(place))
    names = iter([_state_name(name) for name, _ in named_tensors(template)])
    device = next(model.parameters()).device
    return map_state(lambda fresh: tensors[next(names)].to(device, fresh.dtype, copy=True), template)


@torch.inference_mode(False)  # parameters made in it could not be trained
def _load(
    place: Path,
    index: dict[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    overrides: Mapping[str, Any],
) -> LanguageModel:
    try:
        saved = dataclasses.replace(load_recipe(index["recipe"]), overrides=index["overrides"])
    except RecipeError as error:
        unknown = any("unknown block" in problem.message for problem in error.problems)
        hint = "\n  a block of your own has to be registered before loading: import its module first" if unknown else ""
        raise StorageError(f"{place / INDEX}: {error}{hint}") from None
    recipe = _changed(saved, overrides)
    model = assemble(recipe)
    expected = _tensors(model)
    path = place / index["weights"]
    with _reading(path, MODEL_FORMAT) as file:
        metadata = file.metadata()
        if metadata.get("tag") != _tag(path.name) or metadata.get("fingerprint") != saved.fingerprint:
            raise StorageError(f"{path}: these are the weights of another model than the one {INDEX} describes")
        names = list(file.keys())
        _expect_same(
            {name: tuple(file.get_slice(name).get_shape()) for name in names}, _shapes(expected), str(path), recipe
        )
        tensors, read = {}, Checksum()
        for name in sorted(names):
            tensor = file.get_tensor(name)
            read.add(name, tensor)
            if tensor.dtype != expected[name].dtype and not (
                tensor.is_floating_point() and expected[name].is_floating_point()
            ):
                raise StorageError(f"{path}: {name}: expected {expected[name].dtype}, got {tensor.dtype}")
            # a copy, not the file's pages: what happens to the file later is nothing to the model
            tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
    _expect_whole(metadata, str(read), path)
    if any(name not in tensors for name, _ in model.named_buffers()):
        materialise(model, device, dtype, seed=0)  # for buffers that are computed, not saved
    _assign(model, tensors)
    return model


def _changed(saved: Recipe, overrides: Mapping[str, Any]) -> Recipe:
    """``saved`` with ``overrides``. Raises ``RecipeError`` when its weights would not be those of the result."""
    if not overrides:
        return saved
    before = _shapes(_tensors(assemble(saved)))

    def differences(changes: Mapping[str, Any]) -> list[str]:
        return _differences(before, _shapes(_tensors(assemble(load_recipe(saved, changes)))))

    found = differences(overrides)
    if found:
        problems = []
        for path, value in overrides.items():
            with contextlib.suppress(RecipeError):  # right together, but not alone
                if alone := differences({path: value}):
                    problems.append(Problem(str(path), _does_not_fit(alone)))
        raise RecipeError(problems or [Problem("", _does_not_fit(found))], f"overrides of {saved.name or 'recipe'}")
    return load_recipe(saved, overrides)


def _does_not_fit(differences: list[str]) -> str:
    return f"the saved weights do not fit this change: {_first(differences)}; build() makes a new model of it"


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put saved tensors in the place of the model's own, also where two modules share one."""
    new: dict[int, Tensor] = {}
    for name, old in _tensors(model).items():
        tensor = tensors[name]
        is_parameter = isinstance(old, nn.Parameter)
        new[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad) if is_parameter else tensor
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            held.update({name: new[id(mine)] for name, mine in held.items() if id(mine) in new})  # type: ignore[misc]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved, each tensor once."""
    saved = set(model.state_dict(keep_vars=True))
    return {**dict(model.named_parameters()), **{name: b for name, b in model.named_buffers() if name in saved}}


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _expect_same(
    found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], what: str, recipe: Recipe
) -> None:
    differences = _differences(found, expected)
    if differences:
        raise StorageError(f"{what} does not fit the recipe {show(recipe.name or '')}: {_first(differences)}")


def _differences(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> list[str]:
    return [
        *(f"{name} is missing" for name in expected if name not in found),
        *(f"{name} is not part of the model" for name in found if name not in expected),
        *(
            f"{name} is {list(found[name])}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ),
    ]


def _first(differences: list[str]) -> str:
    more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more


def _check_state(tensors: dict[str, Tensor], model: LanguageModel, rows: int, what: str) -> State:
    """Raises ``StorageError`` unless ``tensors`` are a state of ``model``; returns a fresh state of it."""
    with torch.no_grad():
        template = model.init_state(max(rows, 1))
    expected = {_state_name(name): tensor for name, tensor in named_tensors(template)}
    wrong = [f"{name} is missing" for name in expected if name not in tensors]
    wrong += [f"{name} is not part of this model's state" for name in tensors if name not in expected]
    grows = any(getattr(module, "grows", False) for module in model.modules())
    for name in expected.keys() & tensors.keys():
        came, fresh = tensors[name], expected[name]
        # a state that grows does so along dimension 1, time
        fixed = (0, *range(2 if grows else 1, fresh.dim()))
        if came.dim() != fresh.dim() or any(came.shape[d] != fresh.shape[d] for d in fixed):
            wrong.append(f"{name} is {list(came.shape)}, expected {list(fresh.shape)}")
        elif came.dtype != fresh.dtype and not (came.is_floating_point() and fresh.is_floating_point()):
            wrong.append(f"{name} is {came.dtype}, expected {fresh.dtype}")
    if wrong:
        raise StorageError(f"{what} is not a state of this model: {_first(wrong)}")
    try:
        model.origin.check(tensors[_state_name("recipe")])
    except ValueError as error:
        raise StorageError(f"{what}: {error}") from None
    return template


def _rows(tensors: dict[str, Tensor], what: str) -> int:
    counts = {name: tensor.shape[0] if tensor.dim() else None for name, tensor in tensors.items()}
    if len(set(counts.values())) > 1 or None in counts.values():
        shown = "; ".join(f"{name} has {count}" for name, count in list(counts.items())[:3])
        raise StorageError(f"{what}: the tensors disagree about the number of rows: {shown}")
    return next(iter(counts.values()), 0) or 0


def _state_name(path: str) -> str:
    return f"state.{path}" if path else "state"


def _recipe_of(model: nn.Module) -> Recipe:
    recipe = getattr(model, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise StorageError(f"expected a model made by build() or load(), got {type(model).__name__} without a recipe")
    return recipe


def _stored(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, on the CPU, and no two in the same memory.

    States are full of views that share memory; a model's weights are fine as they are, and are not copied.
    """
    holders = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())

    def stored(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_cpu and tensor.is_contiguous() and holders[tensor.untyped_storage().data_ptr()] == 1:
            return tensor
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)

    return {name: stored(tensor) for name, tensor in tensors.items()}


def _expect_whole(metadata: dict[str, str], read: str, path: Path) -> None:
    """Raise ``StorageError`` where the tensors are not those that were saved; files of before checksums have none."""
    if metadata.get("checksum", read) != read:
        raise StorageError(
            f"{path}: damaged: the numbers in it are not those that were saved "
            f"(checksum {read}, expected {show(metadata['checksum'])})"
        )


def _tag(weights: str) -> str:
    return weights.removeprefix("weights-").removesuffix(".safetensors")


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[Any]:
    """An open safetensors file of the right kind and version."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != kind:
                raise StorageError(f"{path}: expected a file of format {kind!r}, got {show(metadata.get('format'))}")
            expect_version(metadata.get("version"), path)
            yield file
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise StorageError(
            f"{path}: expected a whole safetensors file, got {size} bytes that are none: {error}"
        ) from None


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{place}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _named_weights(place: Path) -> str | None:
    try:
        return str(read_index(place)["weights"])
    except StorageError:
        return None


def _clean(place: Path, keep: str, before: str | None) -> None:
    """Remove the replaced weights, and what killed saves have left behind."""
    old = time.time() - _STALE_SECONDS
    for path in place.iterdir():
        ours = WEIGHTS.fullmatch(path.name) is not None or _LEFTOVER.fullmatch(path.name) is not None
        with contextlib.suppress(OSError):
            if path.name == before != keep or (ours and path.name != keep and path.stat().st_mtime < old):
                path.unlink()
