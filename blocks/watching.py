"""Watching blocks at work: what one does is told to whoever asked, and to nobody else.

A watch is active inside of a ``with`` block and knows a model's modules by identity, so nothing is put into them: they
are copied, saved and compiled as ever. Where there is no watch, a block pays one look at an empty list. Compiled code
tells nothing; while a watch is active, what was compiled runs as it is written.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.memory import MemoryState, Options, Tokens
from ..kernels.padding import Layout


class Learned(NamedTuple):
    """What a memory was given in one call, and what came of it."""

    tokens: Tokens
    before: MemoryState
    after: MemoryState | None
    """``None`` in a frozen memory, whose state stays; its gates are zero."""
    norm: Tensor | None
    options: Options
    layout: Layout | None
    """Where the tokens stood, when they were masked: they were moved together for the call."""


class Watch:
    """What is told of the modules of ``model`` between entering and leaving. One use at a time."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a module, got {type(model).__name__}")
        model = getattr(model, "_orig_mod", model)  # of a compiled one, what was compiled
        self._names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._eager: Any = None

    def learned(self, memory: nn.Module, learned: Learned) -> None:
        """A memory has read and written."""

    def gated(self, block: nn.Module, gate: Tensor, a: Tensor, b: Tensor, mask: Tensor | None) -> None:
        """A block has multiplied ``a`` by ``gate``, which is made of ``b``; all ``[batch, time, dim]``."""

    def moved(self, block: nn.Module, layout: Layout) -> contextlib.AbstractContextManager[None]:
        """For as long as this lasts, ``block`` and those in it are told of tokens that ``layout`` moved."""
        return contextlib.nullcontext()

    def __enter__(self) -> Any:
        if self in _active:
            raise RuntimeError("this is already watching: each `with` takes a watch of its own")
        _active.append(self)
        if "torch._dynamo" in sys.modules:
            self._eager = torch.compiler.set_stance("force_eager")
            self._eager.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        _active.remove(self)
        if self._eager is not None:
            self._eager.__exit__(*exception)
            self._eager = None


_active: list[Watch] = []


class _Quiet(threading.local):
    depth = 0
    """How many times what this thread does is to be told to nobody."""


_quiet = _Quiet()


def watches(block: nn.Module) -> Iterable[Watch]:
    """Those who watch this block now."""
    if torch.compiler.is_compiling() or not _active or _quiet.depth:
        return ()
    return [watch for watch in _active if block in watch._names]


def unwatched() -> contextlib.AbstractContextManager[None]:
    """Nothing is told of what this thread does in here: it is no part of the sequence that is read."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() or not _active else _silence()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    _quiet.depth += 1
    try:
        yield
    finally:
        _quiet.depth -= 1


@contextlib.contextmanager
def moved(block: nn.Module, layout: Layout) -> Iterator[None]:
    """``block`` works on tokens that ``layout`` has moved together: it is told where they stood."""
    with contextlib.ExitStack() as stack:
        for watch in watches(block):
            stack.enter_context(watch.moved(block, layout))
        yield


def computing_again() -> bool:
    """Whether this is a forward pass inside of a backward one, which repeats what was told before."""
    return torch._C._current_graph_task_id() != -1
