"""Small models to save, and hands on the files they are saved in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titans_build.recipes.saved_format import checksum

TINY = """
version: 1
name: tiny
dim: 16
vocab: 32
layers:
  mag:
    - type: persistent
      tokens: 2
      of:
        type: gate
        branches: [{type: attention, heads: 2, window: 4}, {type: memory, heads: 2, chunk: 4}]
    - ffn
stack: [mag]
"""
OTHER = TINY.replace("chunk: 4", "chunk: 8")
GROWING = TINY.replace("window: 4", "window: null")


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def weights_of(folder: Path) -> Path:
    (path,) = folder.glob("weights-*.safetensors")
    return path


def edit_index(folder: Path, **changes: Any) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(path: Path, change: Any, **metadata: str) -> None:
    """Write a safetensors file anew with other tensors and metadata."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    tensors = load_file(path)
    change(tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, path, {**old, "checksum": checksum(tensors), **metadata})
