"""Freezing memories: they answer from what they have learned so far and learn nothing more, until they are thawed.

Every block with an attribute ``use`` that it looks at in each call takes part: ``both`` writes and reads, ``read``
reads alone. A frozen memory is one whose ``use`` is ``read`` for the time being, so a state is never touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

_BEFORE = "_use_before_it_was_frozen"


class Frozen:
    """Memories that were frozen together. They are thawed by ``thaw``, or at the end of a ``with`` block."""

    def __init__(self, memories: dict[str, nn.Module]) -> None:
        self.names = list(memories)
        """Where they are: ``layers.0.blocks.0.memory``."""
        self._memories = list(memories.values())
        _freeze(self._memories)

    def thaw(self) -> None:
        """Let them write again; those that were frozen before stay so."""
        for memory in self._memories:
            thaw(memory)

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *exception: object) -> None:
        self.thaw()


def freeze(module: nn.Module) -> Frozen:
    """Freeze every memory in ``module`` that still writes, from now on.

    Raises ``ValueError`` for a memory that is only written (``use: write``): there would be nothing left of it.
    """
    uses = ("both", "write")
    writing = {name: child for name, child in module.named_modules() if getattr(child, "use", None) in uses}
    for name, memory in writing.items():
        if memory.use == "write":
            raise ValueError(f"{name or type(memory).__name__}: only written (use: write), so it cannot be frozen")
    return Frozen(writing)


def thaw(module: nn.Module) -> list[nn.Module]:
    """Let every frozen memory in ``module`` write again; they are returned."""
    memories: list[Any] = [child for child in module.modules() if hasattr(child, _BEFORE)]
    for memory in memories:
        memory.use = vars(memory).pop(_BEFORE)
    return memories


@contextlib.contextmanager
def thawed(module: nn.Module) -> Iterator[None]:
    """Whatever is frozen in ``module`` writes for the length of a ``with`` block."""
    memories = thaw(module)
    try:
        yield
    finally:
        _freeze(memories)


def _freeze(memories: Iterable[Any]) -> None:
    for memory in memories:
        setattr(memory, _BEFORE, memory.use)
        memory.use = "read"
