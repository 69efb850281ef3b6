"""Observers receive the intermediate results of memories and gates while a model runs.

An observer is active inside a ``with`` block and identifies the modules of its model by identity. Nothing is attached
to the modules, which can be copied, saved and compiled as usual. Without active observers, a block checks one empty
list. Compiled code does not report. Compiled models therefore run eagerly while an observer is active.
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

from ..kernels.padding import Layout
from .memory_rule import options


class Learned(NamedTuple):
    """The inputs of one call of the memory operation, and the state after it.

    ``options`` are the ``Options`` of ``titans_memory``, with ``Tokens`` and ``MemoryState``, or a ``Rule`` of
    ``learn``, with ``Writes`` and ``LearnerState``.
    """

    tokens: Any
    before: Any
    after: Any
    """``None`` for a frozen memory, whose state does not change and whose gates are zero."""
    norm: Tensor | None
    options: Any
    layout: Layout | None
    """The original places of the tokens, if a mask was given. Valid tokens of a row are moved together for the call."""


class Observer:
    """Base class: a context manager whose methods are called by the blocks of ``model``. It cannot be nested in itself.

    Raises ``TypeError`` if ``model`` is not a module.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        # The model inside torch.compile(model) has this name, also in the keys of its state_dict. PyTorch has no public
        # function that returns it.
        model = getattr(model, "_orig_mod", model)
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._contexts = contextlib.ExitStack()

    def learned(self, memory: nn.Module, learned: Learned) -> None:
        """Called after each call of the memory operation."""

    def gated(self, block: nn.Module, gate: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
        """Called after ``block`` has multiplied ``a`` by ``gate``, a function of ``b``; all ``[batch, time, dim]``.

        With more than two branches, ``b`` is the concatenated outputs of all but the first.
        """

    def moved(self, block: nn.Module, layout: Layout) -> contextlib.AbstractContextManager[None]:
        """Return a context inside which ``block`` and its children process tokens that ``layout`` has moved."""
        return contextlib.nullcontext()

    def __enter__(self) -> Any:
        if self in active:
            raise RuntimeError("this observer is already active: create another one for a nested `with` block")
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
    """Number of nested ``suppressed`` contexts."""


_thread = _Thread()


def observers_of(block: nn.Module) -> Iterable[Observer]:
    """Return the active observers of the model that ``block`` is part of."""
    if torch.compiler.is_compiling() or not active or _thread.suppressed:
        return ()
    return [observer for observer in active if block in observer._names]


def report_learned(memory: Any, tokens: Any, before: Any, after: Any, layout: Layout | None = None) -> None:
    """Report a call of the memory operation by the block ``memory``, with the fields of ``Learned``."""
    for observer in observers_of(memory):
        observer.learned(memory, Learned(tokens, before, after, memory.norm_gain, options(memory), layout))


def suppressed() -> contextlib.AbstractContextManager[None]:
    """Return a context inside which this thread does not report, for computations that are not part of the sequence."""
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
    """Inside this context, ``block`` processes tokens that ``layout`` has moved. Observers restore their places."""
    with contextlib.ExitStack() as stack:
        for observer in observers_of(block):
            stack.enter_context(observer.moved(block, layout))
        yield


def recomputing() -> bool:
    """Whether a backward pass is running, inside which activation checkpointing repeats forward passes."""
    return _Backward.depth > 0


class _Backward(TorchFunctionMode):
    """Counts the backward passes that are currently running."""

    depth = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (Tensor.backward, torch.autograd.backward, torch.autograd.grad):
            return function(*args, **(kwargs or {}))
        _Backward.depth += 1
        try:
            return function(*args, **(kwargs or {}))
        finally:
            _Backward.depth -= 1
