"""The arguments of a module's call by name, whichever way they were given."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

BEHIND = "_stands_for"
"""Attribute of a module in another's place: that one in a tuple, which keeps it out of the model's tree."""


class Parameters:
    """What a ``forward`` can be given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        kinds = list(inspect.signature(forward).parameters.values())[1:]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.positional = [parameter.name for parameter in kinds if parameter.kind in positional]
        self.names = [p.name for p in kinds if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.needed = [name for p in kinds if p.default is p.empty for name in [p.name] if name in self.names]
        self.any = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in kinds)
        """Whether it takes any number of arguments without names."""


def parameters(module: nn.Module) -> Parameters:
    """Those of a module's class; of what stands in another module's place, those of that module."""
    kind: Any = type(behind(module))
    return _of_class(kind)


def behind(module: nn.Module) -> nn.Module:
    """The module that was in its place before a swap; itself where there was none."""
    held = vars(module).get(BEHIND)
    return behind(held[0]) if held else module


@functools.lru_cache(maxsize=1024)
def _of_class(kind: type) -> Parameters:
    return Parameters(kind.forward)  # type: ignore[attr-defined]


def given(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; those beyond the names by their number."""
    names = parameters(module).positional
    found: dict[str, Any] = {
        (names[index] if index < len(names) else str(index)): value for index, value in enumerate(args)
    }
    found.update(kwargs)
    return found


def changed(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], changes: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other values for arguments that it has."""
    names = parameters(module).positional
    places = {(names[index] if index < len(names) else str(index)): index for index in range(len(args))}
    new = list(args)
    for name, value in changes.items():
        if name in places:
            new[places[name]] = value
    return tuple(new), {name: changes.get(name, value) for name, value in kwargs.items()}
