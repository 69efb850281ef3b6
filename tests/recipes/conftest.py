"""A small model to save, a state of it, and functions that compare and change saved files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from titans_build.blocks.language_model import LanguageModel
from titans_build.recipes import build
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


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> str:
    return TINY


@pytest.fixture
def other() -> str:
    """A recipe whose parameters and states have the shapes of ``tiny``."""
    return TINY.replace("chunk: 4", "chunk: 8")


@pytest.fixture
def growing() -> str:
    """A recipe whose state grows."""
    return TINY.replace("window: 4", "window: null")


@pytest.fixture
def model(tiny: str) -> LanguageModel:
    return build(tiny, seed=3)


@pytest.fixture
def state(model: LanguageModel) -> Any:
    with torch.no_grad():
        return model(torch.arange(14).view(2, 7)).state


@pytest.fixture
def values() -> Any:
    def of(model: nn.Module) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in model.named_parameters()}

    return of


@pytest.fixture
def same() -> Any:
    def compare(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
        return left.keys() == right.keys() and all(
            left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
        )

    return compare


@pytest.fixture
def weights_of() -> Any:
    def of(folder: Path) -> Path:
        (path,) = folder.glob("weights-*.safetensors")
        return path

    return of


@pytest.fixture
def edit_index() -> Any:
    def edit(folder: Path, **changes: Any) -> None:
        path = folder / "model.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


@pytest.fixture
def rewrite() -> Any:
    """Writes a safetensors file again with other tensors and metadata, and their checksum."""

    def write(path: Path, change: Any, **metadata: str) -> None:
        with safe_open(path, "pt") as file:
            old = file.metadata()
        tensors = load_file(path)
        change(tensors)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        save_file(tensors, path, {**old, "checksum": checksum(tensors), **metadata})

    return write
