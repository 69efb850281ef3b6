"""The hooks by which a model's calls are told to their frame. Plain functions: they are copied and pickled by name.

A compiler leaves them alone, and what they call: blocks run as they are written, and what is around them is compiled.
Imported with the first swap, since that takes torch's compiler in.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import nn

from . import recomputing
from .calling import given
from .error import SwapError
from .frame import joined, left, opened
from .site import Gated, Replacement, Site, sites

_PACKED = "_titans_build_packed"
"""Attribute of an ``nn.TransformerEncoder`` that packed padded batches before a swap."""
_REASON = "what a memory carries is kept in Python; compile the model without fullgraph=True"


@torch.compiler.disable(reason=_REASON)
def entering(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before the forward of a module that has sites, or modules with sites, in it."""
    frame, again = joined(module)
    if not again:
        frame = frame if frame is not None else opened(module, _caller())
        frame.begin(module, given(module, args, kwargs))
    assert frame is not None
    for site in _added(module, "before"):
        adapter = site.adapter
        x = adapter.read(module, args, kwargs, site.path)
        y = frame.run(site, x, adapter.own_padding(module, args, kwargs), again)
        args, kwargs = adapter.call(module, args, kwargs, x + y.to(x.dtype))
    return args, kwargs


@torch.compiler.disable(reason=_REASON)
def leaving(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """After it, also when it has failed."""
    frame, again = left(module)
    if frame is None:
        if output is None:  # it failed before it began
            return None
        raise SwapError(f"{type(module).__name__}: swapped while it was being called")
    failed = output is None if again else frame.failed(module)
    done = False
    try:
        if failed:
            return None
        for site in _added(module, "beside", "after"):
            adapter = site.adapter
            x = adapter.read(module, args, kwargs, site.path) if site.how == "beside" else None
            result = adapter.result(output, site.path)
            padding = adapter.own_padding(module, args, kwargs)
            y = frame.run(site, result if x is None else x, padding, again)
            output = adapter.with_result(output, result + y.to(result.dtype))
        recomputing.note(output, frame)
        if not again:
            frame.gives(output)
        done = True
        return output
    finally:
        if not again:
            frame.end(module, failed or not done)


@torch.compiler.disable(reason=_REASON)
def replaced(site: Replacement, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The forward of what stands in another module's place."""
    frame, again = joined(site)
    if frame is None:  # called past its hooks
        return site(*args, **kwargs)
    return frame.replaced(site, args, kwargs, again)


def _caller() -> FrameType:
    """Who calls a hook: what runs until the module's call has ended."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((__name__, "torch._dynamo")):
        frame = frame.f_back
    return frame


def _added(module: nn.Module, *hows: str) -> list[Site]:
    return [site for site in sites(module) if isinstance(site, Gated) and site.how in hows]


def install(module: nn.Module) -> None:
    """Let a module's calls be told; once, however often it is asked for."""
    if not is_installed(module):
        module.register_forward_pre_hook(entering, with_kwargs=True)
        module.register_forward_hook(leaving, with_kwargs=True, always_call=True)
    # padded batches would be packed as only torch's own layers understand them
    if isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor and _is_inside(module.layers):
        module.use_nested_tensor = False
        vars(module)[_PACKED] = True


def is_installed(module: nn.Module) -> bool:
    """Whether they are told."""
    return entering in module._forward_pre_hooks.values()


def _is_inside(module: nn.Module) -> bool:
    return any(isinstance(child, Site) for child in module.modules())


def remove(module: nn.Module) -> None:
    """Let a module be called as ever."""
    if vars(module).pop(_PACKED, False):
        module.use_nested_tensor = True  # type: ignore[assignment]
    for hook, held, marks in (
        (entering, module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (leaving, module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for number in [number for number, other in held.items() if other is hook]:
            for table in (held, *marks):
                table.pop(number, None)
