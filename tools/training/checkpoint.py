"""Checkpoints on disk: one is a folder that appears whole or not at all, with checksums, written by all processes.

Tensors are in safetensors files, one for each process (``torch.distributed.checkpoint``); everything else is in
``checkpoint.json``. Reading one runs no code, and any number of processes can read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...recipes import StorageError
from ...recipes.atomic_write import atomic_write, sync_folder
from ...registry import show
from ..terminal import CommandFailed
from .distributed import Processes
from .run_folder import json_text, read_json, write_file

INDEX = "checkpoint.json"
FORMAT = "titans-build checkpoint"
VERSION = 1
_NAME = re.compile(r"step-(\d{8,})")


def write(folder: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], processes: Processes) -> None:
    """Write a checkpoint. Every process calls this with its shards of the tensors and the same ``facts`` (JSON).

    An existing one is replaced. Raises ``CommandFailed`` if it cannot be written, for example because the disk is
    full; the existing one is then kept.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    temporary = folder.parent / f".{folder.name}.tmp"
    try:
        if processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        processes.barrier()
        # the default format of torch.distributed.checkpoint contains pickles, which run code when they are read
        writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
        with _no_dist_warning():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=processes.world == 1)
        processes.barrier()
        if processes.main:
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": _checksum(path)}
                for path in sorted(temporary.glob("*.safetensors"))
            }
            index = {"format": FORMAT, "version": VERSION, "facts": dict(facts), "files": files}
            with atomic_write(temporary / INDEX) as path:
                path.write_text(json_text({**index, "checksum": _index_checksum(index)}, indent=2), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.rename(temporary, folder)
            sync_folder(folder.parent)
        processes.barrier()
    except BaseException as error:
        if processes.main:
            shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, (CheckpointException, OSError)):
            raise
        cause = _cause(error)
        if not isinstance(cause, OSError) and "os error" not in str(cause):  # safetensors raises its own class
            raise cause from None
        reason = getattr(cause, "strerror", None) or cause
        raise CommandFailed(f"{folder}: the checkpoint cannot be written: {reason}") from cause


def verify(folder: Path) -> dict[str, Any]:
    """The facts of a complete checkpoint. Raises ``StorageError`` that says what is damaged."""
    path = folder / INDEX
    index = read_json(path, FORMAT, "the index of a checkpoint")
    if index.get("version") != VERSION:
        raise StorageError(f"{path}: expected format version {VERSION}, got {show(index.get('version'))}")
    # checkpoints of earlier versions have none
    if "checksum" in index and index.pop("checksum") != _index_checksum(index):
        raise StorageError(f"{path}: damaged: its checksum does not match")
    files, facts = index.get("files"), index.get("facts")
    if not isinstance(files, dict) or not files or not isinstance(facts, dict):
        raise StorageError(f"{path}: expected files and facts, got {show(index)}")
    # all of these are read
    for name in sorted(found.name for found in folder.glob("*.safetensors")):
        if name not in files:
            raise StorageError(f"{folder / name}: {INDEX} does not list this file")
    for name, expected in files.items():
        if not isinstance(expected, dict) or os.path.basename(name) != name:
            raise StorageError(f"{path}: expected a file's size and checksum, got {show(name)}: {show(expected)}")
        file = folder / name
        try:
            size = file.stat().st_size
            if size != expected.get("bytes"):
                raise StorageError(f"{file}: damaged: expected {expected.get('bytes')} bytes, got {size}")
            if _checksum(file) != expected.get("sha256"):
                raise StorageError(f"{file}: damaged: its checksum does not match")
        except OSError as error:
            raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from None
    return facts


def read(folder: Path, tensors: dict[str, Tensor], processes: Processes) -> None:
    """Fill ``tensors``, which have the saved shapes, from a verified checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        with _no_dist_warning():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=processes.world == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        cause = _cause(error)
        raise StorageError(f"{folder}: cannot be read into this model: {cause}") from cause


@contextlib.contextmanager
def _no_dist_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _cause(error: BaseException) -> BaseException:
    """The exception of the first process that failed."""
    while failures := getattr(error, "failures", None):
        error = next(iter(failures.values()))[0]
    return error


def _index_checksum(index: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class CheckpointManager:
    """The checkpoints of a run, ``step-00000100`` each; ``index.json`` names the latest and the best."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint, which need not exist."""
        return self.folder / f"step-{step:08d}"

    def steps(self) -> list[int]:
        """Steps with a checkpoint, complete or damaged, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := _NAME.fullmatch(path.name)))

    def latest(self, warn: Callable[[str], None]) -> tuple[int, dict[str, Any]] | None:
        """The last step with a complete checkpoint, and its facts. ``warn`` is called for damaged later ones.

        Raises ``StorageError`` if there are checkpoints and all are damaged.
        """
        faults = []
        for step in reversed(self.steps()):
            try:
                facts = verify(self.path(step))
            except StorageError as error:
                faults.append(str(error))
                continue
            for fault in faults:
                warn(f"{fault}; resuming from step {step:,}")
            return step, facts
        if faults:
            raise StorageError("all checkpoints are damaged: " + "; ".join(faults))
        return None

    def prune(self, latest: int, best: int | None, keep: int) -> None:
        """Write the index, and remove all checkpoints but the ``keep`` latest and the best."""
        best = best if best is not None and self.path(best).is_dir() else None
        index = {"latest": self.path(latest).name, "best": None if best is None else self.path(best).name}
        write_file(self.folder / "index.json", json.dumps(index) + "\n")
        older = [step for step in self.steps() if step <= latest]
        # later ones were damaged: the run has resumed from before them
        later = {step for step in self.steps() if step > latest}
        for step in ({*older[:-keep]} | later) - {best}:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def remove_temporary(self) -> None:
        """Remove what a killed run was writing."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in self.folder.iterdir():
                if path.name.startswith(".") and path.name.endswith(".tmp"):
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
