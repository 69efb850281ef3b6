"""The index of a saved model: ``model.json``, which says what the model is and which file holds its weights."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from ..registry import nearest, show

INDEX = "model.json"
MODEL_FORMAT = "titans-build model"
VERSION = 1
"""Of the formats of saved models and states."""
WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
"""Names of weights files; every save makes a new one."""

_MAX_BYTES = 4 * 1024 * 1024


class StorageError(ValueError):
    """A file is not what it should be; the message says what came and what was expected."""


def read_index(place: Path) -> dict[str, Any]:
    """The index in the folder ``place``: a recipe, its recorded overrides, and the name of the weights file.

    Raises ``StorageError`` when the folder holds no saved model, or one that a later release wrote.
    """
    path = place / INDEX
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise StorageError(f"{path}: not a regular file; expected the index of a saved model")
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        if os.path.isdir(place):
            raise StorageError(f"{place}: expected a saved model, but there is no {INDEX}") from None
        what = "not a folder" if os.path.exists(place) else "no such folder"
        raise StorageError(f"{place}: {what}; expected a saved model") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        if isinstance(error, StorageError):
            raise
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
    known = ("format", "version", *kinds)
    for key in index:
        if key not in known:
            raise StorageError(f"{path}: {show(key)}: unknown key{nearest(key, known)} (keys: {', '.join(known)})")
    for key, kind in kinds.items():
        if not isinstance(index.get(key), kind):
            raise StorageError(f"{path}: {key}: expected {kind.__name__}, got {show(index.get(key))}")
    if not WEIGHTS.fullmatch(index["weights"]):
        raise StorageError(
            f"{path}: weights: expected weights-<16 hex digits>.safetensors, got {show(index['weights'])}"
        )
    return index


def expect_version(version: Any, path: Path) -> None:
    """Raise ``StorageError`` unless ``version``, read from ``path``, is the one that is written here."""
    if str(version) != str(VERSION):
        raise StorageError(
            f"{path}: expected format version {VERSION}, got {show(version)}; "
            "a file of a later version needs a later titans-build"
        )
