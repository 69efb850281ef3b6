"""The format of saved models and states: ``model.json``, versions, and checksums of tensors."""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


class Checksum:
    """CRC-32 of tensors' names and bytes, added one by one in any order that is the same both times."""

    def __init__(self) -> None:
        self._value = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor, contiguous and on the CPU."""
        self._value = zlib.crc32(name.encode(), self._value)
        # bytes, whatever the numbers are: numpy has no bfloat16
        self._value = zlib.crc32(tensor.detach().reshape(-1).view(torch.uint8).numpy().data, self._value)

    def __str__(self) -> str:
        return f"{self._value:08x}"


def checksum(tensors: dict[str, Tensor]) -> str:
    """Of all of them, sorted by name."""
    total = Checksum()
    for name in sorted(tensors):
        total.add(name, tensors[name])
    return str(total)
