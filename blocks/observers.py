"""Observers: they receive what the memories and gates of a model compute, while it runs unchanged.

An observer is active inside a ``with`` block and knows the model's modules by identity. Nothing is attached to them, so
they are copied, saved and compiled as usual. Without an active observer a block checks one empty list. Compiled code
does not report; while an observer is active, compiled models run eagerly.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels.memory import MemoryState, Options, Tokens
from ..kernels.padding import Layout


class Learned(NamedTuple):
    """The inputs of one call of the memory operation, and the state after it."""

    tokens: Tokens
    before: MemoryState
    after: MemoryState | None
    """``None`` in a frozen memory, whose state does not change. Its gates are zero."""
    norm: Tensor | None
    options: Options
    layout: Layout | None
    """Where the tokens stood if there was a mask: valid tokens are moved together for the call."""


class Observer:
    """Receives what the modules of ``model`` compute between entering and leaving. One use at a time."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        model = getattr(model, "_orig_mod", model)  # the module inside a compiled one
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._contexts = contextlib.ExitStack()

    def learned(self, memory: nn.Module, learned: Learned) -> None:
        """A memory has read and written."""

    def gated(self, block: nn.Module, gate: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
        """A block has multiplied ``a`` by ``gate``, a function of ``b``; all ``[batch, time, dim]``."""

    def moved(self, block: nn.Module, layout: Layout) -> contextlib.AbstractContextManager[None]:
        """Inside this context, ``block`` and its children report tokens that ``layout`` has moved."""
        return contextlib.nullcontext()

    def __enter__(self) -> Any:
        if self in active:
            raise RuntimeError("this observer is already active: use another one for a nested `with`")
        active.append(self)
        self._contexts.enter_context(_Backward())
        if "torch._dynamo" in sys.modules:
            self._contexts.enter_context(torch.compiler.set_stance("force_eager"))
        return self

    def __exit__(self, *exception: Any) -> None:
        active.remove(self)
        self._contexts.__exit__(*exception)


active: list[Observer] = []


class _Thread(threading.local):
    suppressed = 0
    """Depth of nested ``suppressed``."""


_thread = _Thread()


def observers_of(block: nn.Module) -> Iterable[Observer]:
    """The active observers of this block."""
    if torch.compiler.is_compiling() or not active or _thread.suppressed:
        return ()
    return [observer for observer in active if block in observer._names]


def suppressed() -> contextlib.AbstractContextManager[None]:
    """Inside this context nothing is reported from this thread: it is not part of the sequence."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() or not active else _suppress()


@contextlib.contextmanager
def _suppress() -> Iterator[None]:
    _thread.suppressed += 1
    try:
        yield
    finally:
        _thread.suppressed -= 1


@contextlib.contextmanager
def moved(block: nn.Module, layout: Layout) -> Iterator[None]:
    """``block`` processes tokens that ``layout`` has moved: observers are told where they stood."""
    with contextlib.ExitStack() as stack:
        for observer in observers_of(block):
            stack.enter_context(observer.moved(block, layout))
        yield


def recomputing() -> bool:
    """Whether autograd runs backward, so that a forward pass is one that activation checkpointing repeats."""
    return _Backward.depth > 0


class _Backward(TorchFunctionMode):
    """Counts the backward passes that are running."""

    depth = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            return function(*args, **(kwargs or {}))
        _Backward.depth += 1
        try:
            return function(*args, **(kwargs or {}))
        finally:
            _Backward.depth -= 1
