"""Building blocks from their specifications, and initializing parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..registry import Problem, Spec, Unavailable, create
from .block import Block
from .device import as_device, as_dtype


def build_block(
    spec: Spec,
    *,
    dim: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    seed: int | None = 0,
) -> Block:
    """Build a block of width ``dim``. ``spec``: a name, ``{"type": name, ...}``, or a list (a chain).

    The same ``seed`` gives the same parameters on every device. ``seed=None`` uses the global generator. Raises
    ``RecipeError`` with all problems of ``spec``, ``TypeError`` for a block that is already built, and ``ValueError``
    for an unavailable device, an invalid dtype or an invalid seed.
    """
    if isinstance(spec, Block):
        raise TypeError(f"build_block expects the description of a block; this {type(spec).__name__} is already built")
    device, dtype = as_device(device), as_dtype(dtype)
    with torch.device("meta"):
        block: Block = create(spec, dim=dim)
    materialize(block, device, dtype, seed)
    return block


@torch.inference_mode(False)  # parameters created in inference mode could not be trained
def materialize(module: nn.Module, device: torch.device | str, dtype: torch.dtype | None, seed: int | None) -> None:
    """Initialize the parameters of a module built on the meta device, in place.

    Parameters are drawn in float32 on the CPU, so the same seed gives the same parameters for every ``device`` and
    ``dtype``. ``seed=None`` uses the global generator.

    Raises ``RuntimeError`` for a parameter that no ``reset_parameters`` initializes, ``ValueError`` for an invalid
    seed, and ``Unavailable`` if a block cannot run on ``device``.
    """
    check_seed(seed)
    refused = [child.refuse(torch.device(device)) for child in module.modules() if isinstance(child, Block)]
    problems = [Problem("", reason) for reason in dict.fromkeys(refused) if reason is not None]
    if problems:
        raise Unavailable(problems, "model")
    module.to_empty(device="cpu")
    if dtype is not None:
        module.float()  # the default dtype may have been another when it was created
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    devices: list[Any] = []
    owners: list[Any] = [child for child in module.modules() if isinstance(child, Block) or child is module]
    # on the CPU, although the default device may be another
    with torch.random.fork_rng(devices, enabled=seed is not None), torch.no_grad(), torch.device("cpu"):
        if seed is not None:
            torch.manual_seed(seed)
        for owner in owners:
            owner.reset_parameters()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and tensor.isnan().any():
            raise RuntimeError(
                f"{name} {list(tensor.shape)} was left uninitialized: set it in reset_parameters of its block"
            )
    module.to(device=device, dtype=dtype)


def check_seed(seed: int | None) -> None:
    """Raise ``ValueError`` unless ``seed`` is an integer of 64 bits, or ``None``."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")
