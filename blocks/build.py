"""One block, outside a model: built, initialised from a seed, and placed."""

from __future__ import annotations

import torch

from ..registry import Spec, create
from .block import Block, materialise
from .placing import as_device, as_dtype


def build_block(
    spec: Spec,
    *,
    dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    seed: int | None = 0,
) -> Block:
    """The block of width ``dim`` that ``spec`` describes: a name, ``{"type": name, ...}``, or a list, which is a chain.

    The same ``seed`` gives the same parameters on every device; ``seed=None`` draws from the global generator.
    Raises ``RecipeError`` naming everything that is wrong with ``spec``, ``TypeError`` for a built block, and
    ``ValueError`` for a device or dtype that cannot be had or a seed that is none.
    """
    if isinstance(spec, Block):
        raise TypeError(f"build_block expects the description of a block; this {type(spec).__name__} is already built")
    device, dtype = as_device(device), as_dtype(dtype)
    with torch.device("meta"):
        block: Block = create(spec, dim=dim)
    materialise(block, device, dtype, seed)
    return block
