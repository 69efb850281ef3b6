"""Saves and loads models: a folder with an index, ``model.json``, and a safetensors file of weights.

The index contains the recipe, with registered names of blocks, and the name of the file of weights, which is new at
every save. A save writes the weights first and then replaces the index. The old weights are removed once no index
names them. A reader therefore finds the complete old model or the complete new one at any time, also after a save
was killed.

The model's tokenizer, if it has one, is beside it in ``tokenizer.json``, and its checksum is in the index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..blocks.block import is_sharded
from ..blocks.build import materialize
from ..blocks.collectives import any_of_all
from ..blocks.language_model import LanguageModel
from ..registry import RecipeError, show
from .atomic_write import atomic_write, is_old, locked_folder, making_folder, read_regular, remove_stale
from .build import as_device, as_dtype, assemble
from .changes import Shapes, change, differences, shapes_of, tensors_of
from .loading import load_recipe
from .recipe import Recipe
from .saved_format import (
    INDEX,
    MODEL,
    MODEL_FORMAT,
    RUN,
    TOKENIZER,
    VERSION,
    WEIGHTS,
    StorageError,
    add_to_checksum,
    as_path,
    checksum,
    expect_checksum,
    list_differences,
    open_tensors,
    read_index,
    recipe_of,
    saved_folder,
    storable,
    write_errors,
)


def save(model: LanguageModel, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write ``model`` into ``folder``, which is created if needed.

    A model in it is replaced, atomically, if ``model`` was loaded from there or is the last that was saved there, as in
    a training loop. Any other one is replaced only with ``overwrite=True``.

    The parameters keep their dtypes. ``model.tokenizer``, the text of a ``tokenizer.json`` or ``None``, is saved beside
    them. ``imports:`` of the recipe is not saved: a saved model identifies blocks by their registered names only.

    Every process that shares a model (``parallelize``, ``fully_shard``) calls this, and the first one writes it.

    Raises ``StorageError`` if the model was not created by ``build`` or ``load``, if its parameters are no longer those
    of its recipe, if it is on the meta device, if another model or a run is in the folder, or if it cannot be written.
    """
    recipe = recipe_of(model)
    model = next(module for module in model.modules() if isinstance(module, LanguageModel))  # without a wrapper
    tensors = tensors_of(model)
    _expect_same(shapes_of(tensors), shapes_of(tensors_of(assemble(recipe))), "the model", recipe)
    if any(tensor.is_meta for tensor in tensors.values()):
        raise StorageError("the model is on the meta device: it has no values to save")
    place = as_path(folder, "folder")
    if not any(map(is_sharded, tensors.values())):
        _write(model, recipe, tensors, place, overwrite)
        return
    whole, failed = gathered(tensors), False
    try:
        if whole:
            _write(model, recipe, whole, place, overwrite)
    except BaseException:
        failed = True
        raise
    finally:  # the others wait for it
        failed_first = any_of_all(failed, next(iter(tensors.values())).device)
    if failed_first:
        raise StorageError(f"{place}: the first process could not save the model")


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors, on the first process; none on the others. Every process calls this."""
    import torch.distributed as dist

    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        if dist.get_rank() == 0:
            found[name] = whole.cpu()
    return found


def _write(model: LanguageModel, recipe: Recipe, tensors: dict[str, Tensor], place: Path, overwrite: bool) -> None:
    if (place / RUN).exists():  # `load` would find this model in place of that of the run
        raise StorageError(f"{place}: the folder of a run, whose model is in {MODEL}: choose another folder")
    tokenizer = _tokenizer_of(model)
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
    if tokenizer is not None:
        index["tokenizer"] = hashlib.sha256(tokenizer).hexdigest()
    known: set[str] = vars(model).setdefault("_saved_weights", set())
    with write_errors(place), making_folder(place), locked_folder(place) as locked:
        replaced = _index_in(place)
        same = replaced.get("fingerprint") in (recipe.fingerprint, recipe.earlier_fingerprint)
        if (place / INDEX).exists() and not overwrite and not (same and replaced.get("weights") in known):
            other = "another model" if same else "a model of another recipe"
            what = f"{other} is saved there" if replaced else f"there is a {INDEX} that cannot be read"
            raise StorageError(f"{place}: {what}: overwrite=True replaces it")
        stored = storable(tensors)
        metadata = {
            "format": MODEL_FORMAT,
            "version": str(VERSION),
            "fingerprint": recipe.fingerprint,
            "tag": tag,
            "checksum": checksum(stored),
        }
        with atomic_write(place / weights) as temporary:
            save_file(stored, temporary, metadata)
        # before the index: one that names no tokenizer must not be found beside a tokenizer of the model before
        if tokenizer is not None:
            with atomic_write(place / TOKENIZER) as temporary:
                temporary.write_bytes(tokenizer)
        elif "tokenizer" in replaced:
            (place / TOKENIZER).unlink(missing_ok=True)
        with atomic_write(place / INDEX) as temporary:
            temporary.write_text(json.dumps(index, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _remove_old(place, weights, replaced.get("weights"), locked)
        known.discard(replaced.get("weights", ""))
        known.add(weights)


def load(
    folder: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Load the model in ``folder``, or that of the run in it, onto ``device``. ``dtype``: of its parameters; ``None``
    keeps the saved dtypes. ``model.tokenizer`` is the text of its ``tokenizer.json``, or ``None``.

    ``overrides``: values of its recipe by path, as in ``load_recipe``, that keep the weights (``SameWeights``):
    ``{"layers.mac.0.segment": 256}``. The result is a model of another recipe, and rejects states of the saved one.

    Runs no code from the folder. Custom blocks must be registered beforehand, by importing their module or installing
    their package.

    Raises ``StorageError`` if the folder contains no saved model or a damaged one, ``RecipeError`` for overrides that
    are invalid or do not fit the weights, and ``ValueError`` for an unavailable device or an invalid dtype.
    """
    device = as_device(device)
    target = None if dtype is None else as_dtype(dtype)
    place = saved_folder(as_path(folder, "folder"))
    misses = 0
    for _ in range(100):
        index = read_index(place)
        try:
            return _load(place, index, device, target, overrides or {})
        except FileNotFoundError:
            # a save replaced the model between the two reads, unless the same weights are missing every time
            misses += _index_in(place).get("weights") == index["weights"]
            if misses == 5:
                break
    if (place / index["weights"]).exists():
        message = f"the tokenizer is missing, or is not the one that {INDEX} names"
        raise StorageError(f"{place / TOKENIZER}: {message}: restore it, or save the model again")
    raise StorageError(f"{place / index['weights']}: the weights that {INDEX} names are missing")


@torch.inference_mode(False)  # parameters created in inference mode cannot be trained
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
        hint = "\n  custom blocks must be registered before loading: import their module first" if unknown else ""
        raise StorageError(f"{place / INDEX}: {error}{hint}") from None
    recipe = change(saved, overrides)
    model = assemble(recipe)
    expected = tensors_of(model)
    path = place / index["weights"]
    with open_tensors(path, MODEL_FORMAT) as file:
        metadata = file.metadata()
        known = (saved.fingerprint, saved.earlier_fingerprint)
        if metadata.get("tag") != _tag(path.name) or metadata.get("fingerprint") not in known:
            raise StorageError(f"{path}: these are the weights of another model than the one {INDEX} describes")
        names = list(file.keys())
        _expect_same(
            {name: tuple(file.get_slice(name).get_shape()) for name in names}, shapes_of(expected), str(path), recipe
        )
        tensors, read = {}, 0
        for name in sorted(names):
            tensor = file.get_tensor(name)
            read = add_to_checksum(read, name, tensor)
            if tensor.dtype != expected[name].dtype and not (
                tensor.is_floating_point() and expected[name].is_floating_point()
            ):
                raise StorageError(f"{path}: {name}: expected {expected[name].dtype}, got {tensor.dtype}")
            # a copy, since the tensor of the file is mapped memory
            tensors[name] = tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
    expect_checksum(metadata, f"{read:08x}", path)
    if any(name not in tensors for name, _ in model.named_buffers()):
        materialize(model, device, dtype, seed=0)  # computes the buffers that are not saved
    _assign(model, tensors)
    model.tokenizer = saved_tokenizer(place, index)  # type: ignore[assignment]
    vars(model)["_saved_weights"] = {path.name}
    return model


def saved_tokenizer(place: Path, index: dict[str, Any]) -> str | None:
    """The text of the tokenizer in the folder of a saved model with this index, or ``None``.

    Raises ``FileNotFoundError`` if it is not the tokenizer that the index names.
    """
    path = place / TOKENIZER
    try:
        raw = read_regular(path)
        if hashlib.sha256(raw).hexdigest() != index.get("tokenizer", hashlib.sha256(raw).hexdigest()):
            raise FileNotFoundError(path)
        return raw.decode("utf-8")
    except FileNotFoundError:
        if "tokenizer" in index:
            raise
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _tokenizer_of(model: LanguageModel) -> bytes | None:
    """The content of the model's ``tokenizer.json``. Raises ``StorageError`` if it cannot be one."""
    text: Any = getattr(model, "tokenizer", None)
    if text is None:
        return None
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        found = None
    if not isinstance(text, str) or not isinstance(found, dict) or "model" not in found:
        raise StorageError(f"model.tokenizer: expected the text of a {TOKENIZER}, or None, got {show(text)}")
    return text.encode("utf-8", "surrogatepass")


def _assign(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Replace the parameters and buffers of ``model``. Parameters that modules share stay shared."""
    new: dict[int, Tensor] = {}
    for name, old in tensors_of(model).items():
        is_parameter = isinstance(old, nn.Parameter)
        new[id(old)] = nn.Parameter(tensors[name], old.requires_grad) if is_parameter else tensors[name]
    model.load_state_dict({name: new[id(old)] for name, old in model.state_dict(keep_vars=True).items()}, assign=True)


def _expect_same(found: Shapes, expected: Shapes, what: str, recipe: Recipe) -> None:
    wrong = differences(found, expected)
    if wrong:
        raise StorageError(f"{what} does not fit the recipe {show(recipe.name or '')}: {list_differences(wrong)}")


def _tag(weights: str) -> str:
    return weights.removeprefix("weights-").removesuffix(".safetensors")


def _index_in(place: Path) -> dict[str, Any]:
    """The index in a folder, or an empty one."""
    try:
        return read_index(place)
    except StorageError:
        return {}


def _remove_old(place: Path, keep: str, replaced: str | None, locked: bool) -> None:
    """Remove the replaced weights, and files of saves that were killed. ``locked``: no other save is going on."""
    remove_stale(place)
    for path in place.iterdir():
        with contextlib.suppress(OSError):
            left = path.name != keep and WEIGHTS.fullmatch(path.name)
            if left and (locked or path.name == replaced or is_old(path.stat())):
                path.unlink()
