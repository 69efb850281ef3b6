"""Freezing memories: a frozen memory is read, and its state does not change.

Freezing sets the attribute ``use`` of a memory from ``both`` to ``read`` and thawing restores it. This works for every
block that looks up ``use`` in each call. States are not modified.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_BEFORE = "_use_before_it_was_frozen"


class Frozen:
    """Memories that were frozen by one call of :func:`freeze`. As a context manager, it thaws them at the end."""

    def __init__(self, memories: dict[str, nn.Module]) -> None:
        self.names = list(memories)
        """Module paths of the memories: ``layers.0.blocks.0.memory``."""
        self._memories = list(memories.values())
        _freeze(self._memories)

    def thaw(self) -> None:
        """Thaw these memories. Memories that were already frozen before remain frozen."""
        for memory in self._memories:
            thaw(memory)

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *exception: object) -> None:
        self.thaw()


def freeze(module: nn.Module) -> Frozen:
    """Freeze all memories in ``module`` that are written, until they are thawed.

    Raises ``ValueError`` for a memory that is written and not read (``use: write``).
    """
    uses = ("both", "write")
    writing = {name: child for name, child in module.named_modules() if getattr(child, "use", None) in uses}
    for name, memory in writing.items():
        if memory.use == "write":
            raise ValueError(f"{name or type(memory).__name__}: cannot be frozen: it is never read (use: write)")
    return Frozen(writing)


def thaw(module: nn.Module) -> list[nn.Module]:
    """Thaw all frozen memories in ``module`` and return them."""
    memories: list[Any] = [child for child in module.modules() if hasattr(child, _BEFORE)]
    for memory in memories:
        memory.use = vars(memory).pop(_BEFORE)
    return memories


@contextlib.contextmanager
def thawed(module: nn.Module) -> Iterator[None]:
    """Thaw the frozen memories in ``module`` inside a ``with`` block, and freeze them again at its end."""
    memories = thaw(module)
    try:
        yield
    finally:
        _freeze(memories)


def _freeze(memories: Iterable[Any]) -> None:
    for memory in memories:
        setattr(memory, _BEFORE, memory.use)
        memory.use = "read"
