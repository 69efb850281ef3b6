"""Checkpoints: complete or absent, protected by checksums, without code; and which are kept."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from titans_build.recipes import StorageError
from titans_build.tools.terminal import CommandFailed
from titans_build.tools.training import checkpoint
from titans_build.tools.training.checkpoint import CheckpointManager
from titans_build.tools.training.distributed import Processes

TENSORS = {
    "weights": torch.randn(3, 4),
    "narrow": torch.randn(5).bfloat16(),
    "double": torch.randn(2, 2, dtype=torch.float64),
    "one": torch.tensor(7.0),
    "none": torch.zeros(0, 3),
    "counts": torch.arange(4),
    "yes": torch.tensor([True, False]),
    "random": torch.get_rng_state(),
}
ONE = Processes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "step-00000003"
    checkpoint.write(place, TENSORS, {"step": 3, "loss": 0.1}, ONE)
    return place


def test_round_trip_is_exact(folder: Path) -> None:
    assert checkpoint.verify(folder) == {"step": 3, "loss": 0.1}
    read = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    checkpoint.read(folder, read, ONE)
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


def test_checkpoint_has_no_pickles(folder: Path) -> None:
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors"]
    for path in folder.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, KeyError, IndexError, AttributeError)):
            pickle.loads(path.read_bytes())


def _truncate(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    os.truncate(path, path.stat().st_size - 10)


def _flip(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def _empty_index(folder: Path) -> None:
    (folder / checkpoint.INDEX).write_text("", encoding="utf-8")


def _later_version(folder: Path) -> None:
    index = json.loads((folder / checkpoint.INDEX).read_text(encoding="utf-8"))
    (folder / checkpoint.INDEX).write_text(json.dumps({**index, "version": 2}), encoding="utf-8")


def _no_tensors(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    path.unlink()


DAMAGE: list[tuple[Callable[[Path], None], str]] = [
    (_truncate, r"damaged: expected \d+ bytes, got \d+"),
    (_flip, "damaged: its checksum does not match"),
    (_empty_index, "expected the index of a checkpoint"),
    (_later_version, "expected format version 1, got 2"),
    (_no_tensors, "cannot be read: No such file"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_checkpoint_is_skipped(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    kept = CheckpointManager(folder.parent)
    checkpoint.write(kept.path(5), TENSORS, {"step": 5}, ONE)
    damage(kept.path(5))
    with pytest.raises(StorageError, match=message):
        checkpoint.verify(kept.path(5))
    said: list[str] = []
    assert kept.latest(said.append) == (3, {"step": 3, "loss": 0.1})
    assert len(said) == 1 and said[0].endswith("; resuming from step 3")
    damage(folder)
    with pytest.raises(StorageError, match=r"all checkpoints are damaged: .*step-00000005.*step-00000003"):
        kept.latest(said.append)


def test_no_flip_of_the_index_is_read_as_something_else(folder: Path) -> None:
    path = folder / checkpoint.INDEX
    raw, facts = path.read_bytes(), checkpoint.verify(folder)
    refused = 0
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        try:
            assert checkpoint.verify(folder) == facts, at
        except StorageError:
            refused += 1
    assert refused > len(raw) // 2


def test_file_that_is_not_listed_is_refused(folder: Path) -> None:
    (path,) = folder.glob("*.safetensors")
    (folder / "other.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(StorageError, match=r"other.safetensors: checkpoint.json does not list this file"):
        checkpoint.verify(folder)


def test_index_cannot_name_files_elsewhere(folder: Path) -> None:
    index = json.loads((folder / checkpoint.INDEX).read_text(encoding="utf-8"))
    index["files"]["../secret"] = {"bytes": 0, "sha256": ""}
    del index["checksum"]  # as of earlier versions
    (folder / checkpoint.INDEX).write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(StorageError, match="expected a file's size and checksum"):
        checkpoint.verify(folder)


def test_tensors_of_another_model_are_refused(folder: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read into this model"):
        checkpoint.read(folder, {"weights": torch.zeros(3, 5)}, ONE)
    with pytest.raises(StorageError, match="cannot be read into this model"):
        checkpoint.read(folder, {"other": torch.zeros(3)}, ONE)


def test_failed_write_keeps_the_existing_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for step in (3, 4):
        with pytest.raises(CommandFailed, match="the checkpoint cannot be written: No space left on device"):
            checkpoint.write(folder.parent / f"step-{step:08d}", TENSORS, {}, ONE)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_second_write_replaces_the_first(folder: Path) -> None:
    checkpoint.write(folder, {"weights": torch.ones(2)}, {"step": 4}, ONE)
    assert checkpoint.verify(folder) == {"step": 4}
    assert len(list(folder.iterdir())) == 2


def write(kept: CheckpointManager, *steps: int) -> None:
    for step in steps:
        checkpoint.write(kept.path(step), {"x": torch.ones(1)}, {"step": step}, Processes())


def test_prune_keeps_the_latest_and_the_best(tmp_path: Path) -> None:
    kept = CheckpointManager(tmp_path / "checkpoints")
    assert kept.steps() == [] and kept.latest(print) is None
    write(kept, 10, 20, 30, 40)
    kept.prune(40, best=10, keep=2)
    assert kept.steps() == [10, 30, 40]
    index = json.loads((tmp_path / "checkpoints/index.json").read_text(encoding="utf-8"))
    assert index == {"latest": "step-00000040", "best": "step-00000010"}
    kept.prune(40, best=None, keep=1)
    assert kept.steps() == [40]


def test_later_checkpoints_are_removed(tmp_path: Path) -> None:
    kept = CheckpointManager(tmp_path)
    write(kept, 5, 10, 15, 20)
    # 15 and 20 were damaged: the run went on from 10 and has come to 12
    write(kept, 12)
    kept.prune(12, best=None, keep=2)
    assert kept.steps() == [10, 12]


def test_temporary_files_are_removed(tmp_path: Path) -> None:
    kept = CheckpointManager(tmp_path)
    write(kept, 5)
    (tmp_path / ".step-00000010.tmp").mkdir()
    (tmp_path / ".step-00000010.tmp/shard.safetensors").write_bytes(b"half")
    (tmp_path / ".index.json.0123456789abcdef.tmp").write_bytes(b"half")
    assert kept.steps() == [5]
    kept.remove_temporary()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    CheckpointManager(tmp_path / "none").remove_temporary()
