"""Building blocks from their specifications, and initializing parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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

    Modules that are not blocks, such as ``nn.Linear``, are initialized by their own ``reset_parameters``, except for
    what the block that contains them has set.

    Raises ``RuntimeError`` for a parameter or buffer that no ``reset_parameters`` initializes, ``ValueError`` for an
    invalid seed, and ``Unavailable`` if a block cannot run on ``device``.
    """
    check_seed(seed)
    check_device(module, device)
    module.to_empty(device="cpu")
    if dtype is not None:
        module.float()  # the default dtype may have been another when it was created
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            _bytes_of_bool(tensor).fill_(_unset(tensor.dtype))
    devices: list[Any] = []
    owners: list[Any] = [child for child in module.modules() if isinstance(child, Block) or child is module]
    # on the CPU, although the default device may be another
    with torch.random.fork_rng(devices, enabled=seed is not None), torch.no_grad(), torch.device("cpu"):
        if seed is not None:
            torch.manual_seed(seed)
        for owner in owners:
            owner.reset_parameters()
        for name, child in module.named_modules():
            _initialize_rest(child, name, child in owners)
    module.to(device=device, dtype=dtype)


def check_device(module: nn.Module, device: torch.device | str) -> None:
    """Raise ``Unavailable`` if a block of ``module`` cannot run on ``device``."""
    refused = [child.refuse(torch.device(device)) for child in module.modules() if isinstance(child, Block)]
    problems = [Problem("", reason) for reason in dict.fromkeys(refused) if reason is not None]
    if problems:
        raise Unavailable(problems, "model")


def _initialize_rest(module: Any, name: str, reset: bool) -> None:
    """Call ``reset_parameters`` of a module for its own tensors that are not set, unless it was called (``reset``)."""
    own = dict([*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False)])
    left = {name for name, tensor in own.items() if _is_unset(tensor)}
    if left and not reset and hasattr(module, "reset_parameters"):
        kept = {name: tensor.clone() for name, tensor in own.items() if name not in left}
        module.reset_parameters()
        for name, value in kept.items():
            own[name].copy_(value)
        left = {name for name in left if _is_unset(own[name])}
    for name in sorted(left):
        raise RuntimeError(
            f"{name} {list(own[name].shape)} was left uninitialized: set it in reset_parameters of its block"
        )


def _unset(dtype: torch.dtype) -> float:
    """The value that marks elements as not set: NaN, or for integers one that is not used otherwise."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return torch.iinfo(torch.uint8 if dtype == torch.bool else dtype).max // 3 * 2


def _is_unset(tensor: Tensor) -> bool:
    value = _unset(tensor.dtype)
    return bool((tensor.isnan() if value != value else _bytes_of_bool(tensor) == value).any())


def _bytes_of_bool(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def check_seed(seed: int | None) -> None:
    """Raise ``ValueError`` unless ``seed`` is an integer of 64 bits, or ``None``."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**64):
        raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")
