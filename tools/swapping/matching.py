"""Which modules of a model a pattern means."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn

from ...registry import nearest, show
from .error import SwapError
from .site import Site

Where = str | Sequence[str]


def match(model: nn.Module, where: Where, every: int = 1, start: int = 0) -> list[tuple[str, nn.Module]]:
    """Paths and modules that ``where`` names, in the model's own order: from the ``start``-th on, each ``every``-th.

    A pattern is compared name by name: ``*`` stands for one name or a part of it, ``**`` for any number of names.
    What swaps have put in is not looked at.

    Raises ``SwapError`` for a pattern that means no module, modules meant twice, and ones that stand in each other.
    """
    patterns = [where] if isinstance(where, str) else list(where) if isinstance(where, list | tuple) else []
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise SwapError(f"where: expected a pattern such as 'layers.*.self_attn', or a list of them, got {show(where)}")
    named = list(_modules(model))
    found: dict[str, str] = {}
    for pattern in patterns:
        paths = [path for path, _ in named if path and _means(pattern.split("."), path.split("."))]
        if not paths:
            raise SwapError(
                f"where: {show(pattern)} matches no module of {type(model).__name__}{_hint(pattern, named)}"
            )
        for path in paths:
            if path in found:
                raise SwapError(f"where: {path} is matched twice: by {show(found[path])} and by {show(pattern)}")
            found[path] = pattern
    chosen = [(path, module) for path, module in named if path in found][start::every]
    if not chosen:
        raise SwapError(f"where: {len(found)} modules match, and start={start} is past the last of them")
    _expect_apart(chosen)
    return chosen


def _modules(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module under each of its names, without what is inside of a site."""
    yield path, model
    if not isinstance(model, Site):
        for name, child in model._modules.items():
            if child is not None and (not isinstance(child, Site) or child.stands_for_another):
                yield from _modules(child, f"{path}.{name}" if path else name)


def _means(pattern: list[str], path: list[str]) -> bool:
    if not pattern or not path:
        return not path and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _means(pattern[1:], path) or _means(pattern, path[1:])
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _means(pattern[1:], path[1:])


def _hint(pattern: str, named: list[tuple[str, nn.Module]]) -> str:
    """The nearest path, in the pattern's own words: as far as it matches, then the names that stand there."""
    parts = pattern.split(".")
    if "**" in parts:
        return ""
    for depth in range(len(parts) - 1, -1, -1):
        above = [path.split(".") for path, _ in named if depth == 0 or _means(parts[:depth], path.split("."))]
        if depth == 0:
            above = [[]]
        if above:
            split = [path.split(".") for path, _ in named if path]
            names = sorted({path[depth] for path in split if len(path) > depth and path[:depth] in above})
            at = ".".join(parts[:depth]) or "the top"
            listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            return f"{nearest(parts[depth], names)} (at {at} there are: {listed or 'none'})"
    return ""


def _expect_apart(chosen: list[tuple[str, nn.Module]]) -> None:
    names: dict[nn.Module, str] = {}
    for path, module in chosen:
        if module in names:
            raise SwapError(f"where: {names[module]} and {path} are one and the same module: name one of them")
        names[module] = path
    paths = {path for path, _ in chosen}
    for path in paths:
        parts = path.split(".")
        for depth in range(1, len(parts)):
            above = ".".join(parts[:depth])
            if above in paths:
                raise SwapError(f"where: {path} is inside of {above}, which is matched, too: swap one of them")
