"""Which checkpoints are kept."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from titans_build.tools.training import checkpoint
from titans_build.tools.training.checkpoint import CheckpointManager
from titans_build.tools.training.distributed import Processes


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
