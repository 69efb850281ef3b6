"""The files of saved models and states: ``model.json``, safetensors files, versions and checksums."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..registry import nearest, show
from .atomic_write import read_regular
from .recipe import Recipe

INDEX = "model.json"
TOKENIZER = "tokenizer.json"
"""The tokenizer of a model, beside its index, as the ``tokenizers`` package and transformers read it."""
MODEL = "model"
"""The folder of the model inside of that of a run of ``tb.train``."""
RUN = "run.json"
"""The description of a run, in its folder."""
MODEL_FORMAT = "titans-build model"
STATE_FORMAT = "titans-build state"
VERSION = 1
"""Version of the formats of saved models and states."""
WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
"""Names of files of weights. Each save creates a new name."""

_MAX_BYTES = 4 * 1024 * 1024


class StorageError(ValueError):
    """A file or folder is not the saved model or state that was expected, or cannot be read or written."""


def saved_folder(folder: Path) -> Path:
    """The folder of the saved model: that of its model for the folder of a run, otherwise ``folder``."""
    try:
        is_run = (folder / RUN).is_file() or (folder / MODEL / INDEX).is_file()
        return folder / MODEL if is_run and not (folder / INDEX).exists() else folder
    except (OSError, ValueError):  # not a possible name; reading it raises the error
        return folder


def read_index(folder: Path) -> dict[str, Any]:
    """Read ``model.json`` in ``folder``: the recipe, its recorded overrides, and the name of the file of weights.
    A model with a tokenizer also has the checksum of its file.

    Raises ``StorageError`` if the folder contains no saved model, or one of a later version.
    """
    path = folder / INDEX
    try:
        raw = read_regular(path, _MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        if folder.name == MODEL and (folder.parent / RUN).is_file():
            where = f"no {MODEL}/{INDEX}"
            message = f"this run has not saved its model yet ({where}), which it does at its end"
            raise StorageError(f"{folder.parent}: {message}") from None
        if os.path.isdir(folder):
            raise StorageError(f"{folder}: expected a saved model, but there is no {INDEX}") from None
        what = "not a folder" if os.path.exists(folder) else "no such folder"
        raise StorageError(f"{folder}: {what}; expected a saved model") from None
    except (OSError, ValueError) as error:  # ValueError: the path contains a NUL character
        raise StorageError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > _MAX_BYTES:
        raise StorageError(f"{path}: larger than {_MAX_BYTES // 2**20} MiB: not a saved model's index")
    try:
        index = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        what = "empty" if not raw.strip() else f"no JSON text ({error})"
        raise StorageError(f"{path}: expected the index of a saved model; it is {what}") from None
    if not isinstance(index, dict) or index.get("format") != MODEL_FORMAT:
        raise StorageError(f"{path}: expected the index of a saved model (format {MODEL_FORMAT!r}), got {show(index)}")
    expect_version(index.get("version"), path)
    kinds = {"recipe": dict, "overrides": dict, "fingerprint": str, "weights": str}
    known = ("format", "version", *kinds, "tokenizer")
    for key in index:
        if key not in known:
            raise StorageError(f"{path}: {show(key)}: unknown key{nearest(key, known)} (keys: {', '.join(known)})")
    for key, kind in kinds.items():
        if not isinstance(index.get(key), kind):
            raise StorageError(f"{path}: {key}: expected {kind.__name__}, got {show(index.get(key))}")
    if not isinstance(index.get("tokenizer", ""), str):
        raise StorageError(f"{path}: tokenizer: expected a checksum, got {show(index['tokenizer'])}")
    if not WEIGHTS.fullmatch(index["weights"]):
        raise StorageError(
            f"{path}: weights: expected weights-<16 hex digits>.safetensors, got {show(index['weights'])}"
        )
    return index


def expect_version(version: Any, path: Path) -> None:
    """Raise ``StorageError`` unless ``version``, read from ``path``, is ``VERSION``."""
    if str(version) != str(VERSION):
        raise StorageError(
            f"{path}: expected format version {VERSION}, got {show(version)}; "
            "a file of a later version needs a later titans-build"
        )


def checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the names and bytes of contiguous tensors on the CPU, sorted by name: 8 hex digits."""
    value = 0
    for name in sorted(tensors):
        value = add_to_checksum(value, name, tensors[name])
    return f"{value:08x}"


def add_to_checksum(value: int, name: str, tensor: Tensor) -> int:
    """Continue a checksum, which is 0 at the start, with the next tensor by name."""
    value = zlib.crc32(name.encode(), value)
    # as bytes, because NumPy has no bfloat16
    return zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data, value)


def expect_checksum(metadata: dict[str, str], read: str, path: Path) -> None:
    """Raise ``StorageError`` unless ``read`` is the saved checksum. Files of early versions have none."""
    if metadata.get("checksum", read) != read:
        raise StorageError(
            f"{path}: damaged: the tensors differ from those that were saved "
            f"(checksum {read}, expected {show(metadata['checksum'])})"
        )


def storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors accepts them: contiguous, on the CPU, and without shared memory.

    Most tensors of a state are views that share memory, and are copied. Weights usually need no copy.
    """
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.is_cpu and tensor.is_contiguous() and users[tensor.untyped_storage().data_ptr()] == 1:
            return tensor
        return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)

    return {name: convert(tensor) for name, tensor in tensors.items()}


@contextlib.contextmanager
def open_tensors(path: Path, kind: str) -> Iterator[Any]:
    """Open a safetensors file of format ``kind``. Raises ``StorageError``, or ``FileNotFoundError``."""
    try:
        if not path.is_file() and path.exists():  # opening a pipe would wait
            raise OSError("not a regular file")
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
        raise StorageError(f"{path}: expected a complete safetensors file, got {size} bytes: {error}") from None
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
        raise StorageError(f"{path}: cannot be read: {error}") from None


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise ``StorageError`` in place of errors of the file system and of safetensors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def as_path(given: Any, name: str) -> Path:
    """The argument ``name`` as a path. Raises ``TypeError`` if it is none, and ``StorageError`` for the name of a file
    that is not valid text, which safetensors cannot open.
    """
    try:
        path = Path(given)
        str(path).encode()
        return path
    except TypeError:
        raise TypeError(f"{name}: expected a path, got {show(given)}") from None
    except UnicodeEncodeError:
        raise StorageError(f"{show(str(given))}: expected a name in UTF-8, as files of tensors need") from None


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe of ``model``. Raises ``StorageError`` if it has none."""
    recipe = getattr(model, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise StorageError(f"expected a model made by build() or load(), got {type(model).__name__} without a recipe")
    return recipe


def list_differences(differences: list[str]) -> str:
    """The first three of ``differences``, and the number of the others."""
    more = f" and {len(differences) - 3} more differences" if len(differences) > 3 else ""
    return "; ".join(differences[:3]) + more
