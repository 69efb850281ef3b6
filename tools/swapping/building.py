"""The blocks of a swap, made before anything in the model is changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ...blocks import Block, materialise
from ...blocks.layer import Layer
from ...registry import RecipeError, create, is_block, show, validate
from .error import SwapError
from .site import Stateless, copied

Given = Any
"""The description of a block, a built module, or a function from the width to one."""


class Place(NamedTuple):
    """Where a block is to stand."""

    dim: int
    device: torch.device
    dtype: torch.dtype
    layer: bool
    """Whether it takes the place of a whole layer."""


def description(given: Given, dim: int) -> Any:
    """The block's description with every field given; ``None`` for a module. Raises ``RecipeError``, ``SwapError``."""
    if isinstance(given, str | dict | list):
        return validate(given, dim=dim)
    if not isinstance(given, nn.Module) and not callable(given):
        raise SwapError(
            f"block: expected a description ({{'type': 'memory', ...}}), a module, or a function from the width to "
            f"one, got {show(given)}"
        )
    return None


def make(given: Given, place: Place, seed: int | None, *, real: bool = True) -> Block:
    """The block for one place. ``real=False``: on the meta device, to be looked at.

    A module that is given is copied. Raises ``RecipeError`` or ``SwapError``.
    """
    described = isinstance(given, str | dict | list)
    meta = not real or place.device.type == "meta"
    if not described:
        # a dry run draws nothing from torch's own generator
        with torch.random.fork_rng([], enabled=seed is not None or not real):
            if seed is not None:
                torch.manual_seed(seed)
            return _handed_over(given, place)
    with torch.device("meta"):
        # in a recipe, too, a layer is a list of blocks, and elsewhere a list is a chain
        block: Block = (
            Layer(place.dim, of=given if isinstance(given, list) else [given])
            if place.layer
            else create(given, dim=place.dim)
        )
    if meta:
        return block.to(dtype=place.dtype)
    materialise(block, place.device, place.dtype, seed)
    return block


def _handed_over(given: nn.Module | Callable[[int], nn.Module], place: Place) -> Block:
    module = copied(given) if isinstance(given, nn.Module) else given(place.dim)
    if not isinstance(module, nn.Module):
        raise SwapError(f"block: the function made {show(module)} of the width {place.dim}: expected a module")
    if not is_block(module):
        module = Stateless(module, place.dim)
    if module.dim != place.dim:
        raise SwapError(f"block: {type(module).__name__} is of dim {module.dim}, expected {place.dim}")
    block: Block = module.to(device=place.device, dtype=place.dtype)  # type: ignore[assignment]
    return block


def reason(error: Exception) -> str:
    """What stops a block from being made, in one line."""
    if isinstance(error, RecipeError):
        return "; ".join(map(str, error.problems))
    return str(error)
