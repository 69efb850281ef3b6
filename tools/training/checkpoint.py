"""One checkpoint on disk: a folder that appears whole or not at all, with checksums, by any number of processes.

Tensors are in safetensors files, one of each process (``torch.distributed.checkpoint``), and everything else in
``checkpoint.json``. Reading it runs no code, and any other number of processes can read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...recipes import StorageError
from ...recipes.replacing import replacing, sync_folder
from ...registry import show
from ..terminal import CommandFailed
from .distributed import Processes

INDEX = "checkpoint.json"
FORMAT = "titans-build checkpoint"
VERSION = 1


def write(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], processes: Processes) -> None:
    """Write a checkpoint; every process calls it, with its share of the tensors and the same facts (JSON).

    One that is there already is replaced. Raises ``CommandFailed`` when it cannot be written, on a full disk for one:
    what was there stays.
    """
    temporary = folder.parent / f".{folder.name}.tmp"
    with _writing(folder, temporary if processes.main else None):
        if processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        processes.wait()
        _save(temporary, tensors, processes)
        processes.wait()
        if processes.main:
            index = {
                "format": FORMAT,
                "version": VERSION,
                "facts": dict(facts),
                "files": {path.name: _description(path) for path in sorted(temporary.glob("*.safetensors"))},
            }
            with replacing(temporary / INDEX) as path:
                path.write_text(json.dumps(index, indent=2, allow_nan=False) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
        processes.wait()


def verify(folder: Path) -> dict[str, Any]:
    """The facts of a whole checkpoint. Raises ``StorageError`` saying what is wrong with one that is damaged."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StorageError(f"{path}: no such file; expected a checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path}: expected the index of a checkpoint: {error}") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise StorageError(f"{path}: expected the index of a checkpoint (format {FORMAT!r}), got {show(index)}")
    if index.get("version") != VERSION:
        raise StorageError(f"{path}: expected format version {VERSION}, got {show(index.get('version'))}")
    files, facts = index.get("files"), index.get("facts")
    if not isinstance(files, dict) or not files or not isinstance(facts, dict):
        raise StorageError(f"{path}: expected files and facts, got {show(index)}")
    for name, expected in files.items():
        if not isinstance(expected, dict) or os.path.basename(name) != name:
            raise StorageError(f"{path}: expected a file's size and checksum, got {show(name)}: {show(expected)}")
        _check(folder / name, expected)
    return facts


def read(folder: Path, tensors: dict[str, Tensor], processes: Processes) -> None:
    """Fill ``tensors``, which have the shapes they were saved with, from a checkpoint that has been verified."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        with _alone():
            dcp.load(
                tensors,
                storage_reader=HuggingFaceStorageReader(str(folder)),
                no_dist=processes.world == 1,
            )
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        first = _cause(error)
        raise StorageError(f"{folder}: cannot be read into this model: {first}") from first


def _save(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    # torch's own format for this holds pickles, which run code when they are read
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone():
        dcp.save(dict(tensors), storage_writer=writer, no_dist=processes.world == 1)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


@contextlib.contextmanager
def _writing(folder: Path, leftover: Path | None) -> Iterator[None]:
    """Turn whatever hinders writing into one error, and leave nothing half written."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, OSError) as error:
        first = _cause(error)
        if leftover is not None:
            shutil.rmtree(leftover, ignore_errors=True)
        if not isinstance(first, OSError) and "os error" not in str(first):
            raise first from None
        reason = getattr(first, "strerror", None) or first
        raise CommandFailed(f"{folder}: the checkpoint cannot be written: {reason}") from first
    except BaseException:
        if leftover is not None:
            shutil.rmtree(leftover, ignore_errors=True)
        raise


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the first process in which something did."""
    failures = getattr(error, "failures", None)
    while failures:
        error = next(iter(failures.values()))[0]
        failures = getattr(error, "failures", None)
    return error


def _description(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _checksum(path)}


def _check(path: Path, expected: dict[str, Any]) -> None:
    try:
        size = path.stat().st_size
        if size != expected.get("bytes"):
            raise StorageError(f"{path}: damaged: expected {expected.get('bytes')} bytes, got {size}")
        if _checksum(path) != expected.get("sha256"):
            raise StorageError(f"{path}: damaged: its bytes are not those that were written")
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from None


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
