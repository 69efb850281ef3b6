"""Functions that ``torch.compile`` calls while it traces, and takes for what they return then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def constant(function: F) -> F:
    """``torch.compiler.assume_constant_result``, which loads the compiler, a second and more, to set one mark."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
