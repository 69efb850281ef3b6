"""What ``torch.compile`` is told while it traces: which functions are constants, and which numbers to leave open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which loads the compiler, a second and more, to set one mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def told(number: int) -> int | str:
    """``number`` for a message. A tracer would settle on the value of a symbol that it has to spell, for nothing."""
    return "several" if torch.compiler.is_compiling() else number
