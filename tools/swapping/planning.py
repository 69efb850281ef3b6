"""What a swap would do: which settings make sense, and for each module how it is called, how wide it is and where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ...blocks import Block, LanguageModel
from ...registry import nearest, show
from .adapter import Adapter
from .error import SwapError
from .fitting import adapter_of, misfit
from .plan import HOWS, TRAINS, Row
from .site import Replacement, Site
from .width import place, returned_width, same_width, width


def expect_settings(model: Any, how: Any, every: Any, start: Any, train: Any, gate: Any, seed: Any) -> None:
    """Raises ``SwapError``, and ``TypeError`` for what is no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model: expected a module, got {type(model).__name__}")
    if hasattr(model, "_orig_mod") or any(child._compiled_call_impl is not None for child in model.modules()):
        raise SwapError("swap: the model is compiled, and runs what was compiled: swap first, then compile")
    if isinstance(model, LanguageModel):
        raise SwapError("swap: a model of titans-build is changed in its recipe, where blocks nest and share one state")
    for name, value, known in (("how", how, HOWS), ("train", train, TRAINS)):
        if value not in known:
            near = nearest(value, known)
            raise SwapError(f"swap: {name}: expected {', '.join(known[:-1])} or {known[-1]}, got {show(value)}{near}")
    for name, value, least in (("every", every, 1), ("start", start, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SwapError(f"swap: {name}: expected an integer >= {least}, got {show(value)}")
    if isinstance(gate, bool) or not isinstance(gate, int | float) or not math.isfinite(gate):
        raise SwapError(f"swap: gate: expected a number, got {show(gate)}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise SwapError(f"swap: seed: expected an integer, or None for torch's own generator, got {show(seed)}")


def expect_paths(dim: int | Mapping[str, int] | None, paths: Sequence[str]) -> None:
    """Raise ``SwapError`` where widths are given for modules that are not swapped into."""
    for path in dim if isinstance(dim, Mapping) else ():
        if path not in paths:
            raise SwapError(f"swap: dim: {show(path)} is no module of this swap{nearest(path, paths)}")


def row_of(
    model: nn.Module, path: str, module: nn.Module, how: str, fixed: Adapter | None, dim: int | Mapping[str, int] | None
) -> Row:
    """What would come to stand at ``path``; ``fixed`` and ``dim``: what the caller says. Raises ``SwapError``."""
    if isinstance(module, Block):
        raise SwapError(f"{type(module).__name__} is a block of titans-build: blocks nest in a recipe")
    if isinstance(module, torch.jit.ScriptModule):
        raise SwapError(f"{type(module).__name__} is scripted: nothing can be put into it")
    adapter = fixed
    if adapter is None:
        parts = path.split(".")
        around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
        adapter = module.adapter if isinstance(module, Replacement) else adapter_of(module, around)
    wrong = misfit(module, adapter, how == "replace")
    if wrong is not None:
        raise SwapError(wrong)
    if how in ("replace", "beside") and not same_width(module):
        raise SwapError(f"{module} returns another width than it reads: no block does")
    wide = dim.get(path) if isinstance(dim, Mapping) else dim
    if wide is None:
        wide = returned_width(module) if how == "after" else width(module)
    if wide is None:
        does = "returns" if how == "after" else "reads"
        raise SwapError(f"the width of what {type(module).__name__} {does} cannot be told: say it, dim=...")
    if isinstance(wide, bool) or not isinstance(wide, int) or wide < 1:
        raise SwapError(f"dim: expected an integer >= 1, got {show(wide)}")
    return Row(path, type(module).__name__, wide, 0, *place(module, model), adapter)


def to_freeze(model: nn.Module, replaced: Sequence[nn.Module]) -> dict[str, int]:
    """Names and sizes of the parameters that train and are none of a swap's; ``replaced`` will be gone by then."""
    ours = {p for module in model.modules() if isinstance(module, Site) for p in module.parameters()}
    staying = _parameters_without(model, set(replaced))
    named = model.named_parameters()
    return {name: p.numel() for name, p in named if p.requires_grad and p not in ours and p in staying}


def _parameters_without(module: nn.Module, gone: set[nn.Module]) -> set[nn.Parameter]:
    found = {parameter for parameter in module._parameters.values() if parameter is not None}
    for child in module._modules.values():
        if child is not None and child not in gone:
            found |= _parameters_without(child, gone)
    return found
