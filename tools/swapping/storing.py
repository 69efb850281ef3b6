"""The state of a swapped model's memories on disk: one safetensors file, replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...blocks.state import State, batch_size, map_state, named_tensors
from ...recipes.checksum import checksum
from ...recipes.index import VERSION, StorageError, expect_version
from ...recipes.replacing import replacing
from ...registry import show

FORMAT = "titans-build memories"


class Owner(Protocol):
    """The memories that a state is of."""

    names: list[str]

    @property
    def fingerprint(self) -> str: ...

    @property
    def grows(self) -> bool: ...

    def init_state(self, batch_size: int) -> State: ...


def write_state(state: State, path: str | os.PathLike[str], owner: Owner) -> None:
    """Raises ``StorageError`` where there is no state yet, and for a file that cannot be written."""
    place = Path(path)
    if state is None:
        raise StorageError(f"{place}: there is no state to save yet: the model has read nothing")
    tensors = {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in named_tensors(state)
    }
    try:
        batch_size(state)
    except ValueError as error:
        # an encoder that has read one row for each sequence, and a decoder one for each beam
        raise StorageError(f"{place}: not saved: {error}") from None
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "fingerprint": owner.fingerprint,
        "sites": ", ".join(owner.names),
        "checksum": checksum(tensors),
    }
    try:
        with replacing(place) as temporary:
            save_file(tensors, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{place}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def read_state(path: str | os.PathLike[str], owner: Owner) -> State:
    """A state on the devices and in the dtypes that the model keeps its states in.

    Raises ``StorageError`` for a file that is none, is damaged, or is of other memories.
    """
    place = Path(path)
    metadata, tensors = _read(place)
    if metadata.get("format") != FORMAT:
        raise StorageError(f"{place}: expected a file of format {FORMAT!r}, got {show(metadata.get('format'))}")
    expect_version(metadata.get("version"), place)
    if metadata.get("fingerprint") != owner.fingerprint:
        raise StorageError(
            f"{place}: the state is of other memories: of {show(metadata.get('sites'))} "
            f"({metadata.get('fingerprint')}); the model's are {show(', '.join(owner.names))} ({owner.fingerprint})"
        )
    if metadata.get("checksum") != checksum(tensors):
        raise StorageError(f"{place}: damaged: the numbers in it are not those that were saved")
    rows = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors.values()}
    if len(rows) != 1 or 0 in rows:
        raise StorageError(f"{place}: damaged: its tensors disagree about the number of rows")
    with torch.no_grad():
        template = owner.init_state(rows.pop())
    expected = dict(named_tensors(template))
    for name, fresh in expected.items():
        # a state that grows does so along dimension 1, time
        found, fixed = tensors.get(name), (0, *range(2 if owner.grows else 1, fresh.dim()))
        if found is None or found.dim() != fresh.dim() or any(found.shape[d] != fresh.shape[d] for d in fixed):
            got = "nothing" if found is None else list(found.shape)
            raise StorageError(f"{place}: {name} is {got}, expected {list(fresh.shape)}")
    names = iter(expected)

    def put(fresh: Tensor) -> Tensor:
        return tensors[next(names)].to(fresh.device, fresh.dtype, copy=True)

    return map_state(put, template)


def _read(place: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not place.is_file():
        raise StorageError(f"{place}: {'not a file' if place.exists() else 'no such file'}; expected a saved state")
    try:
        with safe_open(place, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{place}: expected a whole safetensors file: {error}") from None
